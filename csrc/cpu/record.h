// What one row holds at one step of the flow, and where.
#pragma once

#include "flow.h"

namespace glf {

// Offsets into a row's record. Every field starts on a cache line and can be read, from any element on, to a whole
// vector of any instruction set.
struct Record {
  Int x;                  // the step's input
  Int y;                  // after the affine map (forward), or before it with c subtracted (inverse)
  Int input;              // [p, context]: the MLP's input
  Int argument[max_layers];  // of the activation, where the backward needs it; else the same as its value
  Int value[max_layers];     // hidden layers of the first network; the second's follow `hidden` elements later
  Int hidden[max_layers];
  Int raw;                // [u, t], or t alone
  Int width;

  template <class T>
  static Record of(const Flow<T>& flow) {
    constexpr Int line = 64 / sizeof(T);
    Int end = 0;
    const auto field = [&end](Int n, Int slack) {
      const Int start = end;
      end += (n + line - 1) / line * line + slack;
      return start;
    };
    const bool argument = flow.activation == Activation::silu || flow.activation == Activation::gelu;
    Record r{};
    r.x = field(flow.dim, line);
    r.y = field(flow.dim, line);
    // Without context the input is p, where the affine map has left it (forward) or found it (inverse).
    r.input = flow.context_dim ? field(flow.width[0], line) : flow.inverse ? r.x : r.y;
    for (int i = 0; i + 1 < flow.layers; ++i) {
      r.hidden[i] = (flow.width[i + 1] + line - 1) / line * line;
      r.value[i] = field(flow.networks * r.hidden[i], 0);
      r.argument[i] = argument ? field(flow.networks * r.hidden[i], 0) : r.value[i];
    }
    r.raw = field(flow.networks * flow.width[flow.layers], line);
    // An odd number of cache lines: rows of a tile spread over all sets of the L1 cache.
    r.width = end / line % 2 ? end : end + line;
    return r;
  }
};

}  // namespace glf
