// Launches of row_products.cuh; see linear.h.
#pragma once

#include "row_product.cuh"

namespace glf::device {

// Products and sums of some layers and steps. One launch; with more than one part two.
const char* row_products(void* stream, const RowProducts& all);

}  // namespace glf::device
