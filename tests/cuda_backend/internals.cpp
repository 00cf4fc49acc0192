// csrc/math.h, csrc/cuda/plan.h and csrc/cuda/conv.h for Python, so that tests can look into them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda/conv.h"
#include "cuda/plan.h"

namespace py = pybind11;
using namespace fused_resnet;

using Triple = std::tuple<double, double, double>;  // count, mean, M2

template <typename A>
Triple merged_parts(const std::vector<Triple>& parts) {
  Part<A> total{};
  for (const auto& [n, mean, m2] : parts) total = merged(total, Part<A>{A(n), A(mean), A(m2)});
  return {total.n, total.mean, total.m2};
}

template <typename A>
Triple part_of(const std::vector<double>& values) {
  A n = 0, mean = 0, m2 = 0, sum = 0;
  for (const double value : values) {
    n += 1;
    include(mean, m2, A(value), 1 / n);
    sum += A(value);
  }
  return {n, finite_or(mean, sum), m2};
}

// How often each vector of a tensor is visited, over all threads of the grid; another `position` than the offset's counts twice.
template <int Vector, bool Rows, bool Reverse>
void visit(const Cut& cut, std::vector<uint8_t>& visits, int64_t c, int64_t s) {
  for (int32_t part = 0; part < cut.parts; ++part) {
    for (int32_t block = 0; block < cut.blocks; ++block) {
      for (int32_t thread = 0; thread < kThreads; ++thread) {
        const Share share(cut, thread, block, part);
        if (!share.inside) continue;
        for (Walk<Vector, Rows, Reverse> walk(cut, share); walk.left > 0; --walk.left, walk.next()) {
          const int64_t i = share.base + walk.offset();
          const int64_t position = Rows ? i / c : i / (c * s) * (s / Vector) + i % s / Vector;
          if (i % Vector == 0) visits.at(i / Vector) += walk.position() == position ? 1 : 2;
        }
      }
    }
  }
}

// (parts, blocks, across, how many vectors of the tensor are not visited exactly once)
auto visited(int64_t n, int64_t c, int64_t s, bool rows, int32_t vector, int32_t multiprocessors, bool reverse) {
  const Cut cut = (rows ? cut_rows : cut_planes)(n, c, s, vector, multiprocessors);
  std::vector<uint8_t> visits(n * c * s / vector);
  const auto run = [&](auto width) {
    constexpr int V = decltype(width)::value;
    if (rows && reverse) visit<V, true, true>(cut, visits, c, s);
    else if (rows) visit<V, true, false>(cut, visits, c, s);
    else if (reverse) visit<V, false, true>(cut, visits, c, s);
    else visit<V, false, false>(cut, visits, c, s);
  };
  switch (vector) {
    case 1: run(std::integral_constant<int, 1>{}); break;
    case 4: run(std::integral_constant<int, 4>{}); break;
    case 8: run(std::integral_constant<int, 8>{}); break;
    default: throw std::invalid_argument("vector");
  }
  return std::make_tuple(cut.parts, cut.blocks, cut.across, int64_t(visits.size()) - std::count(visits.begin(), visits.end(), 1));
}

// The tiles (i, j) of a Gram matrix in the order of their numbers, and the first row of each part and of none.
auto tiles(int64_t rows, int64_t width, int32_t multiprocessors) {
  const Gram plan = gram(rows, width, multiprocessors);
  std::vector<std::pair<int32_t, int32_t>> pairs;
  for (int32_t p = 0; p < plan.pairs; ++p) {
    int32_t i, j;
    tile_pair(p, i, j);
    pairs.emplace_back(i, j);
  }
  std::vector<int64_t> first;
  for (int64_t part = 0; part <= plan.parts; ++part) first.push_back(std::min(plan.first(part), rows));
  return std::make_pair(pairs, first);
}

// A vector in float32, or as bits of a 16-bit type, for the kernels of the convolutions.
struct Given {
  std::vector<float> values;
  std::vector<uint16_t> bits;
  bool present, wide;

  ChannelVector view() const {
    if (!present) return {nullptr, false};
    return {wide ? static_cast<const void*>(values.data()) : static_cast<const void*>(bits.data()), wide};
  }
};

template <typename T>
Given given(const py::object& vector) {
  if (vector.is_none()) return {{}, {}, false, false};
  const auto [values, wide] = vector.cast<std::pair<std::vector<float>, bool>>();
  Given result{values, {}, true, wide};
  for (const float value : values) result.bits.push_back(store<T>(value).bits);
  return result;
}

// act(bn(sum + bias) + residual) of each channel; a vector is None or (values, whether in float32).
template <typename T>
std::vector<float> conv_end(const std::vector<float>& sums, const py::object& bias, const py::object& mean, const py::object& var,
                            const py::object& gamma, const py::object& beta, float eps, const std::vector<float>& residual,
                            bool with_relu) {
  const Given given_bias = given<T>(bias), given_mean = given<T>(mean), given_var = given<T>(var), given_gamma = given<T>(gamma),
              given_beta = given<T>(beta);
  const Channels channels{given_bias.view(), given_mean.view(), given_var.view(), given_gamma.view(), given_beta.view(), eps};
  std::vector<float> out;
  for (size_t c = 0; c < sums.size(); ++c) out.push_back(finished(sums[c], channels.at<T>(c), residual[c], with_relu));
  return out;
}

Conv conv_of(const std::vector<int64_t>& v) {
  if (v.size() != 13) throw std::invalid_argument("n, c, h, w, k, r, s, stride, padding, dilation");
  return with_output({v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9], v[10], v[11], v[12]});
}

auto conv_refused(const std::vector<int64_t>& sizes, int32_t major, int32_t minor) {
  const char* reason = conv_refusal(conv_of(sizes), conv_kernels(major, minor));
  return reason ? py::cast(reason) : py::none();
}

template <typename T>
uint16_t bits(float value) { return store<T>(value).bits; }
template <typename T>
float value(uint16_t bits) { return load(T{bits}); }

PYBIND11_MODULE(internals, m) {
  m.attr("threads") = kThreads;
  m.attr("tile") = kTile;
  m.attr("most_positions") = kMostPositions;
  m.def("merged_float", merged_parts<float>);
  m.def("merged_double", merged_parts<double>);
  m.def("part_float", part_of<float>);
  m.def("part_double", part_of<double>);
  m.def("moments", [](double n, double pilot, double sum, double sum_sq) {
    const Moments result = moments(n, pilot, sum, sum_sq);
    return std::make_pair(result.mean, result.m2);
  });
  m.def("m2_about", [](double n, double mean, double m2, double about) { return m2_about(n, {mean, m2}, about); });
  m.def("unbiased", unbiased);
  m.def("update_running", update_running<double>);
  m.def("bn", bn<double>);
  m.def("bn_grad", bn_grad<double>);
  m.def("bn_rstd", bn_rstd<double>);
  m.def("bn_rstd_fast", bn_rstd_fast);
  m.def("relu", relu<double>);
  m.def("relu_grad", relu_grad<double>);
  m.def("visited", visited);
  m.def("vector_size", vector_size);
  m.def("flat_blocks", flat_blocks);
  m.attr("flat") = kThreads * kFlat;
  m.def("tiles", tiles);
  m.def("conv_extent", conv_extent);
  m.def("conv_end_bf16", conv_end<bf16>);
  m.def("conv_end_fp16", conv_end<fp16>);
  m.def("conv_kernels", [](int32_t major, int32_t minor) { return static_cast<int>(conv_kernels(major, minor)); });
  m.def("conv_refusal", conv_refused);
  m.def("conv_tile", [](const std::vector<int64_t>& sizes, int32_t multiprocessors) {
    const Conv conv = conv_of(sizes);
    const ConvTile tile = conv_tile(conv, multiprocessors);
    return std::make_tuple(static_cast<int>(tile), conv_tiles(conv, tile), conv_tiles(conv, ConvTile::wide));
  });
  m.def("bf16_bits", bits<bf16>);
  m.def("fp16_bits", bits<fp16>);
  m.def("bf16_value", value<bf16>);
  m.def("fp16_value", value<fp16>);
}
