#include "bench/printers.h"

#include "base/error.h"
#include "bench/columns.h"

namespace coreinfer::bench {
namespace {

// values joined by ", ", each written with `format`.
template <typename T>
std::string joined(const char* format, const std::vector<T>& values) {
  std::string text;
  for (const T v : values) {
    if (!text.empty()) text += ", ";
    text += format_string(format, v);
  }
  return text;
}

// Appends `text` with every `quote` in it doubled, between two of them.
void append_quoted(std::string& out, const std::string& text, char quote) {
  out += quote;
  for (const char c : text) {
    out += c;
    if (c == quote) out += c;
  }
  out += quote;
}

// The names of all columns, or what `append` writes for each of them, between separators.
template <typename Append>
std::string each_column(const char* separator, const Append& append) {
  std::string line;
  for (const Column& column : columns()) {
    if (&column != &columns().front()) line += separator;
    append(line, column);
  }
  return line;
}

std::string column_names(const char* separator) {
  return each_column(separator, [](std::string& line, const Column& c) { line += c.name; });
}

class CsvPrinter final : public Printer {
 public:
  using Printer::Printer;
  void header() override { put(column_names(",") + "\n"); }
  void row(const Row& row) override {
    put(each_column(",",
                    [&](std::string& line, const Column& column) {
                      append_quoted(line, column.value(row).value_or(""), '"');
                    }) +
        "\n");
  }
};

class JsonPrinter : public Printer {
 public:
  using Printer::Printer;
  void header() override { put("[\n"); }
  void row(const Row& row) override {
    put(first_ ? "  {\n    " : ",\n  {\n    ");
    put(members(row, ",\n    ") + "\n  }");
    first_ = false;
  }
  void footer() override { put("\n]\n"); }

 protected:
  static std::string members(const Row& row, const char* separator) {
    std::string text = each_column(separator, [&](std::string& line, const Column& column) {
      line += '"';
      line += column.name;
      line += "\": ";
      append_value(line, column, row);
    });
    const std::vector<long long> ns(row.samples_ns.begin(), row.samples_ns.end());
    text += separator;
    text += "\"samples_ns\": [" + joined("%lld", ns) + "]";
    text += separator;
    text += "\"samples_ts\": [" + joined("%.6g", row.samples_ts()) + "]";
    return text;
  }

 private:
  static void append_string(std::string& out, const std::string& text) {
    out += '"';
    for (const char c : text) {
      if (static_cast<unsigned char>(c) < 0x20) {
        out += format_string("\\u%04x", static_cast<unsigned>(c));
        continue;
      }
      if (c == '"' || c == '\\') out += '\\';
      out += c;
    }
    out += '"';
  }
  static void append_value(std::string& out, const Column& column, const Row& row) {
    const std::optional<std::string> text = column.value(row);
    if (!text) {
      out += "null";
    } else if (column.type == ColumnType::kText) {
      append_string(out, *text);
    } else if (column.type == ColumnType::kBool) {
      out += *text == "0" ? "false" : "true";
    } else {
      out += *text;
    }
  }
  bool first_ = true;
};

class JsonlPrinter final : public JsonPrinter {
 public:
  using JsonPrinter::JsonPrinter;
  void header() override {}
  void row(const Row& row) override {
    put("{");
    put(members(row, ", "));
    put("}\n");
  }
  void footer() override {}
};

class SqlPrinter final : public Printer {
 public:
  using Printer::Printer;
  void header() override {
    put("CREATE TABLE IF NOT EXISTS llama_bench (\n  ");
    put(each_column(",\n  ", [](std::string& line, const Column& column) {
      line += column.name;
      line += column.type == ColumnType::kText    ? " TEXT"
              : column.type == ColumnType::kFloat ? " REAL"
                                                  : " INTEGER";
    }));
    put("\n);\n\n");
  }
  void row(const Row& row) override {
    put("INSERT INTO llama_bench (" + column_names(", ") + ") VALUES (");
    put(each_column(", ", [&](std::string& line, const Column& column) {
      const std::optional<std::string> value = column.value(row);
      if (value) {
        append_quoted(line, *value, '\'');
      } else {
        line += "NULL";
      }
    }));
    put(");\n");
  }
};

}  // namespace

void flush_results(std::FILE* out) {
  if (std::fflush(out) != 0 || std::ferror(out) != 0) {
    throw_error(ErrorKind::kIo, "the results could not be written to %s",
                out == stdout ? "stdout" : "stderr");
  }
}

std::unique_ptr<Printer> make_printer(const std::string& format, std::FILE* out,
                                      const std::vector<Group>& plan) {
  if (format == "csv") return std::make_unique<CsvPrinter>(out);
  if (format == "json") return std::make_unique<JsonPrinter>(out);
  if (format == "jsonl") return std::make_unique<JsonlPrinter>(out);
  if (format == "sql") return std::make_unique<SqlPrinter>(out);
  return make_markdown_printer(out, plan);
}

}  // namespace coreinfer::bench
