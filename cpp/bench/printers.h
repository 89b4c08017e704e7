// Printers: rows to a stream as csv, json, jsonl, sql or a Markdown table, one row at a time and
// flushed, so that a run that stops has shown what it measured. The formats are llama-bench's.
#pragma once

#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "bench/plan.h"
#include "bench/row.h"

namespace coreinfer::bench {

// Throws kIo when stdout or stderr did not take what was written.
void flush_results(std::FILE* out);

class Printer {
 public:
  explicit Printer(std::FILE* out) : out_(out) {}
  virtual ~Printer() = default;
  virtual void header() {}
  virtual void row(const Row& row) = 0;
  virtual void footer() {}
  void flush() { flush_results(out_); }

 protected:
  void put(const std::string& text) { std::fwrite(text.data(), 1, text.size(), out_); }
  std::FILE* out_;
};

// format: md, csv, json, jsonl or sql. The plan decides which columns a Markdown table needs.
std::unique_ptr<Printer> make_printer(const std::string& format, std::FILE* out,
                                      const std::vector<Group>& plan);
std::unique_ptr<Printer> make_markdown_printer(std::FILE* out, const std::vector<Group>& plan);

}  // namespace coreinfer::bench
