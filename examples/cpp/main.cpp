// Generates from a package of kvfx, without Python: kvfx_run FOLDER NEW_TOKENS < ids > ids
//
// Token ids of one prompt come in as text, the ids of the likeliest continuation go out. How long it took and what the cache holds
// is said on standard error.
#include <c10/core/InferenceMode.h>

#include <chrono>
#include <iostream>
#include <iterator>

#include "package.h"

static double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

static int run(const std::string& folder, int64_t count) {
  c10::InferenceMode guard;
  auto start = std::chrono::steady_clock::now();
  Package package(folder);
  std::cerr << "loaded in " << seconds_since(start) << " s\n";

  std::vector<int64_t> ids{std::istream_iterator<int64_t>(std::cin), {}};
  int64_t vocabulary = package.about["vocabulary"].number(), most = package.about["max_new_tokens"].number() + 1;
  if (package.about["batch"].number() != 1) throw std::runtime_error("the package takes several rows, this program gives one");
  if (ids.empty() || !std::cin.eof()) throw std::runtime_error("expected token ids on standard input");
  for (int64_t id : ids)
    if (id < 0 || id >= vocabulary) throw std::runtime_error("token " + std::to_string(id) + " is not in the vocabulary");
  if (count < 1 || count > most) throw std::runtime_error("the package generates 1 to " + std::to_string(most) + " tokens");

  auto cache = package.empty_cache();
  auto prompt = at::tensor(ids, at::kLong).unsqueeze(0);
  start = std::chrono::steady_clock::now();
  auto seen = prompt.size(1);
  auto logits = package.run(package.prefill_of(seen), prompt, cache, 0);
  double prefill = seconds_since(start);

  start = std::chrono::steady_clock::now();
  for (int64_t index = 0;; ++index) {
    auto token = logits.argmax(-1, /*keepdim=*/true);
    std::cout << token.item<int64_t>() << (index + 1 < count ? " " : "\n");
    if (index + 1 == count) break;
    logits = package.run(package.step_behind(seen), token, cache, seen);
    ++seen;
  }
  double decode = seconds_since(start);

  size_t bytes = 0;
  for (const auto& tensor : cache) bytes += tensor.nbytes();
  std::cerr << "prefill of " << ids.size() << " tokens in " << prefill << " s, then "
            << (count > 1 ? static_cast<double>(count - 1) / decode : 0.0) << " tokens/s; the cache is of " << bytes << " bytes\n";
  return 0;
}

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: kvfx_run FOLDER NEW_TOKENS < ids\n";
    return 2;
  }
  try {
    return run(argv[1], std::stoll(argv[2]));
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 1;
  }
}
