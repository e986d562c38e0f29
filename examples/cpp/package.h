// A package that kvfx.export wrote: its description, its weights, which all programs share, and its programs.
#pragma once

#include <ATen/ATen.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <unistd.h>

#include <cstring>
#include <fstream>
#include <memory>
#include <sstream>
#include <unordered_map>

#include "json.h"

using Loader = torch::inductor::AOTIModelPackageLoader;
using Tensors = std::unordered_map<std::string, at::Tensor>;

inline at::ScalarType dtype_of(const std::string& name) {  // as safetensors and as torch spell it
  static const std::map<std::string, at::ScalarType> known{
      {"F64", at::kDouble}, {"F32", at::kFloat}, {"F16", at::kHalf}, {"BF16", at::kBFloat16}, {"I64", at::kLong},
      {"I32", at::kInt}, {"I16", at::kShort}, {"I8", at::kChar}, {"U8", at::kByte}, {"BOOL", at::kBool},
      {"float64", at::kDouble}, {"float32", at::kFloat}, {"float16", at::kHalf}, {"bfloat16", at::kBFloat16},
      {"int64", at::kLong}, {"int32", at::kInt}};
  auto found = known.find(name);
  if (found == known.end()) throw std::runtime_error("the package holds tensors of type " + name + ", which are not known here");
  return found->second;
}

inline std::string read_text(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

// A file mapped into memory, from which weights are used where they are.
class Mapped {
 public:
  explicit Mapped(const std::string& path) {
    int file = ::open(path.c_str(), O_RDONLY);
    struct stat about {};
    if (file < 0 || ::fstat(file, &about) != 0) throw std::runtime_error("cannot read " + path);
    size_ = static_cast<size_t>(about.st_size);
    void* memory = ::mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
    ::close(file);
    if (memory == MAP_FAILED) throw std::runtime_error("cannot map " + path);
    data_ = static_cast<char*>(memory);
  }
  Mapped(const Mapped&) = delete;
  Mapped& operator=(const Mapped&) = delete;
  ~Mapped() { ::munmap(data_, size_); }

  // The tensors of a safetensors file: 8 bytes that say how long the header is, the header, all numbers.
  Tensors tensors() const {
    uint64_t header = 0;
    if (size_ < sizeof header) throw std::runtime_error("the weights are cut off");
    std::memcpy(&header, data_, sizeof header);
    if (header > size_ - sizeof header) throw std::runtime_error("the weights are cut off");
    Json about = JsonReader::read(std::string(data_ + sizeof header, header));
    Tensors all;
    for (const auto& [name, tensor] : about.fields) {
      if (name == "__metadata__") continue;
      auto place = tensor["data_offsets"].numbers();
      uint64_t start = sizeof header + header;
      if (start + static_cast<uint64_t>(place.at(1)) > size_) throw std::runtime_error("the weights are cut off");
      void* first = data_ + start + place.at(0);
      all[name] = at::from_blob(first, tensor["shape"].numbers(), at::dtype(dtype_of(tensor["dtype"].text)));
    }
    return all;
  }

 private:
  char* data_ = nullptr;
  size_t size_ = 0;
};

class Package {
 public:
  explicit Package(const std::string& folder)
      : about(JsonReader::read(read_text(folder + "/kvfx.json"))), weights_(folder + "/weights.safetensors") {
    const std::string &format = about["format"].text, &device = about["device"].text;
    if (format.rfind("1.", 0) != 0) throw std::runtime_error("the package has format " + format + ", expected 1");
    if (device != "cpu") throw std::runtime_error("the package is for " + device + ", expected cpu");
    Tensors stored = weights_.tensors();
    for (const auto& [name, entry] : about["entries"].fields) {
      Tensors given;
      for (const auto& [constant, held] : entry["weights"].fields) {
        if (!stored.count(held.text)) throw std::runtime_error("the weights lack " + held.text);
        given[constant] = stored[held.text];
      }
      auto program = std::make_unique<Loader>(folder + "/programs.pt2", name);
      // Before anything runs: without its weights a program reads address 0. It only points to them; `weights_` outlives it.
      program->load_constants(given, /*use_inactive=*/false, /*check_full_update=*/true, /*user_managed=*/true);
      programs_[name] = std::move(program);
    }
  }

  // An empty cache: the tensors that every entry point takes and writes in place.
  std::vector<at::Tensor> empty_cache() const {
    std::vector<at::Tensor> cache;
    for (const auto& held : about["state"].items)
      cache.push_back(at::full(held["shape"].numbers(), held["empty"].number(), at::dtype(dtype_of(held["dtype"].text))));
    return cache;
  }

  // The entry point that reads a prompt, or one token more behind `seen` of them.
  std::string prefill_of(int64_t length) const { return length > 1 ? "prefill" : has("first") ? "first" : "decode"; }
  std::string step_behind(int64_t seen) const { return seen == 1 && has("second") ? "second" : "decode"; }

  // Logits of the last token behind `seen` others, [B, V] float32. A program does not check what it is given.
  at::Tensor run(const std::string& name, const at::Tensor& ids, const std::vector<at::Tensor>& cache, int64_t seen) {
    const Json& entry = about["entries"][name];
    if (ids.size(1) < entry["shortest"].number() || ids.size(1) > entry["longest"].number())
      throw std::runtime_error(name + " takes " + entry["shortest"].text + " to " + entry["longest"].text + " tokens, got " +
                               std::to_string(ids.size(1)));
    std::vector<at::Tensor> inputs{ids};
    if (entry["masked"].flag()) inputs.push_back(at::ones_like(ids, at::kBool));
    if (entry.fields.count("counted") && entry["counted"].flag()) inputs.push_back(at::empty({seen + 1, 0}, at::kFloat));
    inputs.insert(inputs.end(), cache.begin(), cache.end());
    auto outputs = programs_.at(name)->run(inputs);
    if (entry["checks"].flag() && !outputs.at(1).item<bool>()) throw std::runtime_error("scores of the prompt are not finite");
    return outputs.at(0);
  }

  Json about;

 private:
  bool has(const std::string& entry) const { return about["entries"].fields.count(entry) > 0; }

  Mapped weights_;
  std::map<std::string, std::unique_ptr<Loader>> programs_;  // which die before the weights
};
