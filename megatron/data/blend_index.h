// Which dataset serves each sample of a blend.

#pragma once

#include <cstdint>
#include <vector>

// Writes for each of `num_samples` samples the dataset that serves it and which of the dataset's samples that is. Each
// time the dataset is served that is furthest behind its share, the first of equal ones. One that has served its limit
// is left out from then on, and the shares of the others are counted anew. The weights are finite, none is negative,
// and the limits of those that are not zero allow `num_samples`.
void fill_blend_index(const std::vector<double>& weights, const std::vector<std::int64_t>& limits,
                      std::int64_t num_samples, std::uint16_t* dataset, std::int64_t* sample);
