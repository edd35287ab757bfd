// Affine maps that are permutations, also of scaled columns: their products are gathers. With 256 columns and 512 hidden units the
// products took a quarter of a pass.
#pragma once

#include "tile.h"

#include <vector>

namespace glf::GLF_ISA {

// Which of a flow's matrices A (K, D, D), or of their inverses, have one number other than 0 in each row and column.
template <class T>
class Permutations {
 public:
  // `rows` are those that will be multiplied: to read a matrix costs as much as a few of them. Dense ones show in their first row.
  // An infinite number in x becomes NaN in all columns where it is multiplied, and stays alone where it is gathered.
  Permutations(const Flow<T>& flow, const T* A, idx rows) : dim_(flow.dim) {
    const idx K = flow.steps, D = dim_;
    if (!A || D < least_dim || rows < 2 * MR) return;
    for (idx k = 0; k < K; ++k) {
      std::vector<int> to(D), from(D, -1);
      bool permutes = true;
      for (idx i = 0; i < D && permutes; ++i) {
        const T* row = A + (k * D + i) * D;
        int count = 0, column = 0;
        for (idx j = 0; j < D; ++j) {
          count += row[j] != 0;
          column += row[j] != 0 ? static_cast<int>(j) : 0;
        }
        permutes = count == 1 && std::exchange(from[column], static_cast<int>(i)) < 0;
        to[i] = column;
      }
      if (!permutes) continue;
      if (maps_.empty()) maps_.resize(K);
      Map& map = maps_[k];
      for (idx i = 0; i < D; ++i) map.scale.push_back(A[(k * D + i) * D + to[i]]);
      for (idx j = 0; j < D; ++j) map.scale_of_column.push_back(map.scale[from[j]]);
      map.to = std::move(to);
      map.from = std::move(from);
    }
  }

  // y = x A_k + c, or x A_kᵀ, of `rows` rows; false, and nothing is done, if A_k is no permutation. c may be null.
  bool apply(idx k, bool transposed, idx rows, const T* x, idx x_m, T* y, idx y_m, const T* c) const {
    if (maps_.empty() || maps_[k].to.empty()) return false;
    const Map& map = maps_[k];
    const int* source = (transposed ? map.to : map.from).data();
    const T* scale = (transposed ? map.scale : map.scale_of_column).data();
    for (idx m = 0; m < rows; ++m) {
      const T* in = x + m * x_m;
      T* out = y + m * y_m;
      if (c)
        for (idx j = 0; j < dim_; ++j) out[j] = in[source[j]] * scale[j] + c[j];
      else
        for (idx j = 0; j < dim_; ++j) out[j] = in[source[j]] * scale[j];
    }
    return true;
  }

 private:
  // With fewer columns a product is as fast.
  static constexpr idx least_dim = 32;
  struct Map {
    std::vector<int> to, from;              // of row i the column, of column j the row
    std::vector<T> scale, scale_of_column;  // the number there
  };
  idx dim_;
  std::vector<Map> maps_;  // of K, or none
};

}  // namespace glf::GLF_ISA
