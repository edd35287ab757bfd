// Clusters on the host: all warps of all blocks of a cluster are threads, with shared memory of exactly the size asked for.
#pragma once

#include "cuda/cluster_kernels.cuh"

#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

namespace glf::device {

// run() for every block of a grid, a cluster of `size` blocks after the other.
template <class Run>
void launch_clusters(long long grid, int size, int bytes, Run run) {
  for (long long first = 0; first < grid; first += size) {
    HostCluster cluster(size, cluster_warps);
    for (int i = 0; i < size; ++i) {
      cluster.shared.push_back(static_cast<unsigned char*>(std::aligned_alloc(16, (bytes + 15) / 16 * 16)));
      std::memset(cluster.shared[i], 0xff, bytes);
    }
    std::vector<std::thread> blocks;
    for (int i = 0; i < size; ++i)
      blocks.emplace_back([&, i] {
        host_block = {first + i, cluster.shared[i], &cluster};
        run();
      });
    for (std::thread& block : blocks) block.join();
    for (unsigned char* memory : cluster.shared) std::free(memory);
  }
}

}  // namespace glf::device
