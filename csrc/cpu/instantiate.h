// All kernels of one instruction set: included once by each kernels_*.cpp.
#pragma once

#include "affine_coupling.h"
#include "autoregressive_backward.h"
#include "channel_map.h"
#include "flow_passes.h"
#include "glow_network.h"
#include "lu.h"
#include "plu.h"
#include "spline_op.h"

namespace glf::GLF_ISA {

extern const Kernels<float> kernels_f32;
extern const Kernels<double> kernels_f64;
const Kernels<float> kernels_f32{forward<float>,      backward<float>,     autoregressive<float>, autoregressive_backward<float>, coupling<float>,
                                 coupling_backward<float>, spline<float>, spline_backward<float>, plu_assemble<float>, plu_assemble_backward<float>,
                                 slogdet_inverse<float>, glow_network<float>, glow_network_backward<float>, glow_coupling<float>, glow_coupling_backward<float>,
                                 channel_map<float>, channel_map_backward<float>};
const Kernels<double> kernels_f64{forward<double>,      backward<double>,     autoregressive<double>, autoregressive_backward<double>, coupling<double>,
                                  coupling_backward<double>, spline<double>, spline_backward<double>, plu_assemble<double>, plu_assemble_backward<double>,
                                  slogdet_inverse<double>, glow_network<double>, glow_network_backward<double>, glow_coupling<double>, glow_coupling_backward<double>,
                                  channel_map<double>, channel_map_backward<double>};

}  // namespace glf::GLF_ISA
