// What one row holds at one step of the flow, and where.
#pragma once

#include "flow.h"

namespace glf {

// Whether a'(x) needs x itself; elsewhere a(x) is enough.
inline bool keeps_argument(Activation a) {
  return a == Activation::silu || a == Activation::gelu || a == Activation::hardswish || a == Activation::mish;
}

// Offsets of a residual network's block, whose widths are all the same.
struct ResidualBlock {
  Int h;         // its input
  Int h_value;   // a(h)
  Int argument;  // of the activation between its linear layers, as in Record
  Int value;     // of that activation
  Int branch;    // what its linear layers make
  Int gate;      // σ(the context's layer)
};

// Offsets into a row's record. Every field starts on a cache line and can be read, from any element on, to a whole
// vector of any instruction set.
struct Record {
  Int x;                  // the step's input
  Int y;                  // after the affine map (forward), or before it with c subtracted (inverse)
  Int input;              // [p, context]: the network's input
  Int argument[max_layers];  // of the activation, where the backward needs it; else the same as its value
  Int value[max_layers];     // hidden layers of the first network; the second's follow `hidden` elements later
  Int hidden[max_layers];
  ResidualBlock block[max_blocks + 1];  // of a residual network; after the last one h alone
  Int raw;                // [u, t], or t alone
  Int width;

  template <class T>
  static Record of(const Flow<T>& flow) {
    constexpr Int line = 64 / sizeof(T);
    Record r = laid_out(flow, line, line);
    // An odd number of cache lines: rows of a tile spread over all sets of the L1 cache.
    if (r.width / line % 2 == 0) r.width += line;
    return r;
  }

  // That of a panel, whose rows lie in the lanes: offsets in units, without gaps.
  template <class T>
  static Record of_panel(const Flow<T>& flow) {
    return laid_out(flow, 1, 0);
  }

 private:
  // Fields are multiples of `line`, and `gap` is behind those that are read to a whole vector from any element on.
  template <class T>
  static Record laid_out(const Flow<T>& flow, Int line, Int gap) {
    Int end = 0;
    const auto field = [&end, line](Int n, Int slack) {
      const Int start = end;
      end += (n + line - 1) / line * line + slack;
      return start;
    };
    const bool argument = keeps_argument(flow.activation);
    Record r{};
    r.x = field(flow.dim, gap);
    r.y = field(flow.dim, gap);
    // Without context the input is p, where the affine map has left it (forward) or found it (inverse).
    r.input = flow.context_dim ? field(flow.width[0], gap) : flow.inverse ? r.x : r.y;
    if (flow.network == Network::residual) {
      const auto hidden = [&] { return field(flow.outputs(0), 0); };
      // Where the backward does not need h, or a branch, of every block, all blocks have it in one place.
      for (int j = 0; j <= flow.blocks(); ++j) {
        ResidualBlock &b = r.block[j], &first = r.block[0];
        b.h = argument || j == 0 ? hidden() : first.h;
        if (j == flow.blocks()) break;
        b.h_value = hidden();
        b.value = hidden();
        b.argument = argument ? hidden() : b.value;
        b.branch = flow.context_dim || j == 0 ? hidden() : first.branch;
        if (flow.context_dim) b.gate = hidden();
      }
    }
    for (int i = 0; flow.network == Network::mlp && i + 1 < flow.layers; ++i) {
      r.hidden[i] = (flow.width[i + 1] + line - 1) / line * line;
      r.value[i] = field(flow.networks * r.hidden[i], 0);
      r.argument[i] = argument ? field(flow.networks * r.hidden[i], 0) : r.value[i];
    }
    r.raw = field(flow.networks * flow.outputs(flow.layers - 1), gap);
    r.width = end;
    return r;
  }
};

}  // namespace glf
