// What the bindings of small and medium coupling flows share: sizes as Python gives them.
#pragma once

#include "bindings_cuda.h"

#include "cuda/cluster_sections.cuh"
#include "cuda/flow.h"

namespace glf::bindings {

namespace device = glf::device;

// FlowShape.numbers() of small.py.
inline device::FlowShape shape_of(const std::vector<int64_t>& n) {
  STD_TORCH_CHECK(n.size() >= 9 && n.size() <= 8 + device::most_layers, "glf_fast: one to four hidden layers");
  device::FlowShape s{};
  s.steps = static_cast<int>(n[0]);
  s.dim = static_cast<int>(n[1]);
  s.context = static_cast<int>(n[2]);
  s.half_tiles = static_cast<int>(n[3]);
  s.hidden_tiles = static_cast<int>(n[4]);
  s.map = static_cast<device::Precision>(n[5]);
  s.mlp = static_cast<device::Precision>(n[6]);
  s.blocks = static_cast<int>(n[7]);
  s.layers = static_cast<int>(n.size()) - 8;
  STD_TORCH_CHECK(s.steps > 0 && s.dim > 0 && s.dim <= 16 * s.half_tiles && s.context >= 0, "glf_fast: sizes that do not fit");
  const int width = s.blocks > 0 ? s.hidden_tiles / s.blocks : 0;
  STD_TORCH_CHECK(s.blocks == 1 || ((s.blocks == 8 || s.blocks == 16) && s.half_tiles <= device::cluster_warps &&
                                    s.context <= 8 * device::cluster_warps && width * s.blocks == s.hidden_tiles &&
                                    (width == 2 || width == 4 || width == 8)),
                  "glf_fast: a cluster that does not fit");
  for (int l = 0; l < s.layers; ++l) {
    s.hidden[l] = static_cast<int>(n[8 + l]);
    STD_TORCH_CHECK(s.hidden[l] > 0 && s.hidden[l] <= 8 * s.hidden_tiles, "glf_fast: hidden layers that do not fit");
  }
  return s;
}

inline void check_numbers(const Tensor& t, int64_t numbers) {
  STD_TORCH_CHECK(t.numel() >= numbers, "glf_fast: a kernel got a tensor that is too small");
}

}  // namespace glf::bindings
