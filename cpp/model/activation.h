// Names of activations: those of Hugging Face's configurations, which GGUF's hidden_activation key
// takes over, and what users say. Flows in and out: text and Activation.
#pragma once

#include <optional>
#include <string>

#include "backend/backend.h"

namespace coreinfer {

// "silu", "gelu_tanh", "relu", "drelu" (on gate and up), "fatrelu:T" (relu that is 0 up to T), or
// another name of one of them; nothing for any other text.
std::optional<Activation> activation_named(const std::string& text);
// The name that gives it back.
std::string activation_name(const Activation& activation);
// The same for a network with or without a gate, which not every activation suits. Where there is
// none, `expected` gets what could have been named: "silu, gelu_tanh, ...".
std::optional<Activation> activation_for(const std::string& text, bool gated,
                                         std::string* expected);

}  // namespace coreinfer
