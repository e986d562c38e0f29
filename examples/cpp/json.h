// As much of a JSON reader as the two headers of a package need; what is no JSON is an exception.
#pragma once

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

struct Json {
  std::string text;  // of a string, number, true, false or null
  std::vector<Json> items;
  std::map<std::string, Json> fields;

  const Json& operator[](const std::string& name) const {
    auto found = fields.find(name);
    if (found == fields.end()) throw std::runtime_error("no field \"" + name + "\" in the JSON");
    return found->second;
  }
  int64_t number() const { return std::stoll(text); }
  bool flag() const { return text == "true"; }
  std::vector<int64_t> numbers() const {
    std::vector<int64_t> all;
    for (const auto& item : items) all.push_back(item.number());
    return all;
  }
};

class JsonReader {
 public:
  static Json read(const std::string& source) {
    JsonReader reader(source);
    return reader.value();
  }

 private:
  explicit JsonReader(const std::string& source) : source_(source) {}

  char next() {  // the next character that is no space
    at_ = source_.find_first_not_of(" \t\r\n", at_);
    if (at_ == std::string::npos) throw std::runtime_error("the JSON ends too early");
    return source_[at_];
  }

  void expect(char character) {
    if (next() != character) throw std::runtime_error(std::string("no ") + character + " in the JSON where one is due");
    ++at_;
  }

  std::string string() {
    expect('"');
    std::string text;
    for (; source_.at(at_) != '"'; ++at_) {
      if (source_[at_] == '\\') ++at_;  // what is read here escapes quotes and backslashes only
      text += source_.at(at_);
    }
    ++at_;
    return text;
  }

  template <typename Each>
  void all(char open, char close, Each each) {
    expect(open);
    while (next() != close) {
      each();
      if (next() == ',') ++at_;
    }
    ++at_;
  }

  Json value() {
    Json json;
    switch (next()) {
      case '{':
        all('{', '}', [&] {
          std::string name = string();
          expect(':');
          json.fields[name] = value();
        });
        break;
      case '[':
        all('[', ']', [&] { json.items.push_back(value()); });
        break;
      case '"':
        json.text = string();
        break;
      default: {
        size_t end = source_.find_first_of(",]} \t\r\n", at_);
        json.text = source_.substr(at_, end - at_);
        at_ = end == std::string::npos ? source_.size() : end;
      }
    }
    return json;
  }

  const std::string& source_;
  size_t at_ = 0;
};
