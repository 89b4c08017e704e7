// MetadataParser: header bytes -> Metadata. It checks every key, type, count and length against
// the format, the caps of limits.h and the bytes that remain; parse() before the tensor infos are
// read, finish() after, when the reader's buffer no longer moves.
#pragma once

#include "gguf/byte_reader.h"
#include "gguf/metadata.h"

namespace coreinfer {

class MetadataParser {
 public:
  void parse(ByteReader& reader, uint64_t n_entries);
  // Takes the reader's header. Throws kGguf on a duplicate key.
  Metadata finish(ByteReader& reader);

 private:
  Metadata metadata_;
};

// Throws kGguf unless a key or tensor name is not empty, valid UTF-8 and free of control bytes.
void check_name(const ByteReader& reader, const char* what, std::string_view name);

}  // namespace coreinfer
