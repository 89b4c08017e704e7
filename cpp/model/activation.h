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
// "silu, gelu_tanh, ...", for messages.
std::string activation_names();

}  // namespace coreinfer
