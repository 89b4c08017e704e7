#include "bench/usage.h"

#include <algorithm>
#include <vector>

#include "base/error.h"
#include "base/thread_pool.h"
#include "bench/value_list.h"

namespace coreinfer::bench {
namespace {

// `anyway`: values that ask for what is done anyway; "*" stands for all.
struct Reason {
  std::vector<std::string_view> flags;
  const char* why;
  std::vector<std::string_view> anyway;
};

const Reason kMeaningless[] = {
    {{"-hf", "-hfr", "--hf-repo", "-hff", "--hf-file", "-hft", "--hf-token", "--offline"},
     "nothing is downloaded; give the path of a GGUF file with -m",
     {}},
    {{"-C", "--cpu-mask", "--numa"}, "start it under taskset or numactl instead", {"0x0"}},
    {{"--cpu-strict"}, "start it under taskset or numactl instead", {"0"}},
    {{"--prio"}, "start it under nice instead", {"0"}},
    {{"--poll"}, "how the threads wait is fixed", {"*"}},
    {{"-ncmoe", "--n-cpu-moe"}, "there are no mixture-of-experts models", {"0"}},
    {{"-dev", "--device", "-ts", "--tensor-split", "-ot", "--override-tensor", "-fitt",
      "--fit-target", "-fitc", "--fit-ctx"},
     "everything is computed by the CPU or by one GPU (-ngl, -mg)",
     {}},
    {{"-sm", "--split-mode"},
     "everything is computed by the CPU or by one GPU (-ngl, -mg)",
     {"none", "layer"}},
    {{"-nkvo", "--no-kv-offload", "-nopo", "--no-op-offload", "--no-host"},
     "everything is computed by the CPU or by one GPU (-ngl, -mg)",
     {"0"}},
    {{"-fa", "--flash-attn"}, "there is one way to compute attention", {"*"}},
    {{"-embd", "--embeddings"}, "embeddings are not computed", {"0"}},
    {{"-mmp", "--mmap"}, "model files are always mapped", {"1"}},
    {{"-dio", "--direct-io"}, "model files are always mapped", {"0"}},
    {{"-lm", "--load-mode", "-lzm", "--lazy-mode"}, "model files are always mapped", {"auto"}},
    {{"--repack"}, "each type has one layout to compute with", {"1"}},
};

constexpr const char* kUsage = R"(usage: coreinfer-bench -m MODEL [options]

Measures prompt processing (pp) and generation (tg) as llama-bench does, with its flags and its
columns first, dense and with core neurons. Results go to stdout, everything else to stderr.

options:
  -h, --help
  --version
  --list-devices            the devices and instruction sets that can be used
  -r, --repetitions N       repetitions of each test (default: 5)
  --delay SECONDS           pause before each test (default: 0)
  -o, --output FORMAT       md, csv, json, jsonl or sql, to stdout (default: md)
  -oe, --output-err FORMAT  a second one, to stderr (default: none)
  --progress                what is being run, on stderr
  -v, --verbose             models and every repetition, on stderr
  --no-warmup               skip the run before the repetitions
  --tokens FILE             token ids to read: what `coreinfer tokenize` prints, ids separated by
                            white space, or a JSON list of them. A test takes depth, prompt and
                            generated tokens from it in this order
                            (default: ids drawn from the vocabulary)
  --seed N                  of the drawn ids (default: 0)
  --activation NAME         of the feed-forward networks, for files that have lost it: relu, drelu,
                            fatrelu:0.01, silu or gelu_tanh (default: what the file says)
  --memory-limit SIZE       bytes that the process may hold, for example 2GiB or 500MB: where all
                            does not fit, dense FFN weights come in a layer at a time
                            (default: no limit)
  --bandwidth GIB           memory that is read, around every repetition, to measure the read
                            bandwidth; less is used where memory is short; 0 skips (default: 1)

tests, as lists; every combination is run:
  -m, --model FILE
  -p, --n-prompt N          prompt tokens to process, 0: none (default: 512)
  -n, --n-gen N             tokens to generate, 0: none (default: 128)
  -pg PP,TG                 a prompt and then generation, timed as one
  --verify N                tokens to verify in one decode step, 1 to 16 (verifyN); its time over
                            that of a decode step is measured in turn with it
  -d, --n-depth N           tokens already in the context (default: 0)
  -b, --batch-size N        (default: 2048)
  -ub, --ubatch-size N      (default: 512); a prefill step takes the smaller of both
  -ctk, --cache-type-k T    f16, f32 or q8_0 (default: f16)
  -ctv, --cache-type-v T    f16, f32 or q8_0 (default: f16)
  -t, --threads N           (default: %d)
  -ngl, --n-gpu-layers N    0: on the CPU; -1, or the model's number of layers or more: on a GPU;
                            fewer: the last N layers on a GPU (default: 0)
  -mg, --main-gpu N         which GPU (default: 0)
  --core MODE               off: dense weights; stable: the core neurons of the prompt; exact: dense,
                            with the core neurons' drafts verified (default: off)
  --statistic S             count, count_gate, count_abs or flock (default: flock)
  --alpha A                 share of a token's active neurons that are counted; not for flock
                            (default: 0.4)
  --beta B                  share of the neurons to keep in every layer (default: 0.4)
  --layers FIRST:LAST       layers with core neurons, LAST excluded, the others stay dense
                            (default: all)
  --patch RANK              let the kept neurons answer for the dropped ones, 0: no; of stable
                            (default: 0)
  --drafts N                drafts in one verification, of exact (default: 4)
  --accept A                share of the drafts of exact that come true; forced, since ids are
                            given and not drawn (default: 0.9)
  --weighted                weigh activations by the norms of the down projection's columns

Values are separated by commas or given by repeating the flag. Ranges of whole numbers are
first-last, first-last+step or first-last*factor.

With core neurons, tg and verify tests always follow a prefill of all tokens of -d and -p, from
which the neurons are chosen: tg128 with -p 512 is "tg128 @ d512". The dense row of the same setting
stands before the core rows. In pp tests, counting, selecting, compacting and the patch are timed
with the prompt.
)";

}  // namespace

std::string usage() { return format_string(kUsage, ThreadPool::default_threads()); }

std::optional<Meaningless> meaningless(std::string_view flag, std::string_view value) {
  const auto holds = [](const std::vector<std::string_view>& list, std::string_view what) {
    return std::find(list.begin(), list.end(), what) != list.end();
  };
  for (const Reason& reason : kMeaningless) {
    if (!holds(reason.flags, flag)) continue;
    if (value.empty()) return Meaningless{reason.why, false};
    bool harmless = true;
    for (const std::string& member : split_list(flag, value, ',')) {
      harmless = harmless && (holds(reason.anyway, "*") || holds(reason.anyway, member));
    }
    return Meaningless{reason.why, harmless};
  }
  return std::nullopt;
}

}  // namespace coreinfer::bench
