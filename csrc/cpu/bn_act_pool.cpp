// out = max_pool(act(bn(x))), the window 3x3 with stride 2 and padding 1: training and eval forward, backward.
//
// act's output exists a few rows at a time, in a buffer per thread that stays in the cache. Forward normalises a row of x
// once and takes the maxima of the windows over three such rows. Backward spreads the windows' gradients over two rows,
// (2a, ...) and (2a + 1, ...), which only windows of the rows a and a + 1 can have picked, and goes on as bn_act does.
#include <torch/csrc/stable/library.h>

#include <array>
#include <limits>

#include "batch_norm.h"

namespace fused_resnet {
namespace {

// x is (N, C, H, W), out (N, C, P, Q). An image is a row of H x W pixels of C lanes (channels_last), or C such of one lane.
struct Pool {
  Shape shape;
  int64_t h, w, p, q, lanes;

  explicit Pool(const Tensor& x) : shape(shape_of(x)) {
    STD_TORCH_CHECK(x.dim() == 4, "x must be (N, C, H, W), got ", x.dim(), " dimensions");
    h = x.size(2), w = x.size(3), p = (h + 1) / 2, q = (w + 1) / 2;
    lanes = shape.rows ? shape.c : 1;
  }

  int64_t row() const { return w * lanes; }  // elements in a row of x
  int64_t out_row() const { return q * lanes; }
  int64_t out_numel() const { return shape.n * shape.c * p * q; }
  std::array<int64_t, 4> out_size() const { return {shape.n, shape.c, p, q}; }
  std::array<int64_t, 4> out_stride() const {
    const int64_t c = shape.c, image = c * p * q;
    return shape.rows ? std::array<int64_t, 4>{image, 1, q * c, c} : std::array<int64_t, 4>{image, p * q, q, 1};
  }
  int64_t padded() const { return (2 * q + 1) * lanes; }  // from column -1 to the last that a window sees
};

// ---- forward ----------------------------------------------------------------------------------------------------------

// What the windows see: act(bn(x)) as it would be stored, so that equal values are those of torch.
template <typename T, bool Relu>
FR_CLONES void activate(Tile t, const T* __restrict x, acc_t<T>* __restrict out, const acc_t<T>* __restrict mean,
                        const acc_t<T>* __restrict scale, const acc_t<T>* __restrict beta) {
  for (int64_t r = 0; r < t.rows; ++r) {
    const int64_t i = r * t.stride;
    for (int64_t l = 0; l < t.lanes; ++l) {
      acc_t<T> y = bn(load(x[i + l]), mean[l], scale[l], beta[l]);
      if constexpr (Relu) y = relu(y);
      out[i + l] = load(store<T>(y));
    }
  }
}

// n windows over three rows: of one pixel and n channels or (Planes) of one channel, two columns apart. `first`: the first
// tap that is no padding, but for the column at the left edge of planes.
template <typename T, bool Offsets, bool Planes>
FR_HD void maxima(int64_t n, const acc_t<T>* __restrict top, const acc_t<T>* __restrict middle,
                  const acc_t<T>* __restrict bottom, int first, T* __restrict out, uint8_t* __restrict offsets) {
  using A = acc_t<T>;
  using Index = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
  const int64_t step = Planes ? 2 : 1, column = Planes ? 1 : n;
  for (int64_t l = 0; l < n; ++l) {
    const int64_t i = l * step;
    A best = -std::numeric_limits<A>::infinity();
    Index which = Index(first) + (Planes ? Index(l == 0) : 0);
    for (int c = 0; c < 3; ++c) take<Offsets>(top[i + c * column], Index(c), best, which);
    for (int c = 0; c < 3; ++c) take<Offsets>(middle[i + c * column], Index(3 + c), best, which);
    for (int c = 0; c < 3; ++c) take<Offsets>(bottom[i + c * column], Index(6 + c), best, which);
    out[l] = store<T>(best);
    if constexpr (Offsets) offsets[l] = uint8_t(which);
  }
}

// A row of windows over rows of act's output, from column -1 on, padded with -inf.
template <typename T, bool Offsets>
FR_CLONES void pool_row(const Pool& s, const acc_t<T>* top, const acc_t<T>* middle, const acc_t<T>* bottom, int first,
                        T* out, uint8_t* offsets) {
  if (s.lanes == 1) return maxima<T, Offsets, true>(s.q, top, middle, bottom, first, out, offsets);
  for (int64_t j = 0; j < s.q; ++j) {
    const int64_t i = 2 * j * s.lanes;
    maxima<T, Offsets, false>(s.lanes, top + i, middle + i, bottom + i, first + (j == 0), out, offsets);
    out += s.lanes;
    if constexpr (Offsets) offsets += s.lanes;
  }
}

// The rows of act's output that windows see, made when they are first asked for. One per thread.
template <typename T, bool Relu>
class Activation {
  using A = acc_t<T>;

 public:
  explicit Activation(const Pool& s) : s_(s), memory_(scratch<A>(4 * s.padded())) {
    fill(memory_.get(), 4 * s.padded(), -std::numeric_limits<A>::infinity());
  }

  // Row h of an image; beyond its edges -inf.
  const A* row(const T* image, int64_t h, const Lanes<A>& k) {
    if (h < 0 || h >= s_.h) return slot(3);
    const T* source = image + h * s_.row();
    if (made_[h % 3] != source) {
      const Tile tile = s_.lanes == 1 ? Tile{1, s_.w, 0} : Tile{s_.w, s_.lanes, s_.lanes};
      activate<T, Relu>(tile, source, slot(h % 3) + s_.lanes, k.mean, k.scale, k.beta);
      made_[h % 3] = source;
    }
    return slot(h % 3);
  }

 private:
  A* slot(int64_t i) { return memory_.get() + i * s_.padded(); }

  const Pool& s_;
  std::unique_ptr<A[]> memory_;
  const T* made_[3] = {};
};

// Training reads x twice, or once where it is planes whose channels fit in the L2 cache; eval once.
template <typename T, bool Relu, bool Offsets>
void forward(const Pool& s, const T* x, T* out, uint8_t* offsets, const Vectors<acc_t<T>>& vectors,
             const Statistics<acc_t<T>>* stats) {
  using A = acc_t<T>;
  const auto windows = [=, &s](int64_t image, int64_t p, Activation<T, Relu>& rows, const Lanes<A>& k) {
    const T* from = x + image * s.h * s.row();
    const int64_t to = (image * s.p + p) * s.out_row();
    const A* top = rows.row(from, 2 * p - 1, k);
    const A* middle = rows.row(from, 2 * p, k);
    const A* bottom = rows.row(from, 2 * p + 1, k);
    pool_row<T, Offsets>(s, top, middle, bottom, p == 0 ? 3 : 0, out + to, Offsets ? offsets + to : nullptr);
  };
  if (s.shape.rows) {
    if (stats) rows_statistics<T>(Rows(s.shape), x, *stats);
    auto memory = scratch<A>(s.lanes * Lanes<A>::kVectors);
    const Lanes<A> k(memory.get(), s.lanes);
    for (int64_t c = 0; c < s.lanes; ++c) k.set(vectors, c, c, 1, 1);
    return parallel_ranges(s.shape.n * s.p, 2 * s.row(), [&](int64_t begin, int64_t end) {
      Activation<T, Relu> rows(s);
      for (int64_t i = end; i-- > begin;) windows(i / s.p, i % s.p, rows, k);
    });
  }
  const Planes plan(s.shape);
  parallel_ranges(plan.groups, plan.work(), [&](int64_t begin, int64_t end) {
    Activation<T, Relu> rows(s);
    auto memory = scratch<A>(s.w * Lanes<A>::kVectors);
    const Lanes<A> k(memory.get(), s.w);
    for (int64_t g = begin; g < end; ++g) {
      if (stats) planes_statistics<T>(plan, g, x, *stats);
      for (int64_t c = g * plan.group; c < g * plan.group + plan.channels(g); ++c) {
        k.set(vectors, c, 0, s.w, 1);
        for (int64_t n = s.shape.n; n-- > 0;) {
          for (int64_t p = s.p; p-- > 0;) windows(n * s.shape.c + c, p, rows, k);
        }
      }
    }
  });
}

// ---- backward ---------------------------------------------------------------------------------------------------------

// The gradient of act's output at n quads of pixels, (even, even), (even, odd), (odd, even), (odd, odd), from the four
// windows that see them: those `here`, to the right, below, and below to the right. Planes: the quads lie side by side, in
// `even` and `odd` each, and the other two pointers are not used.
template <typename T, bool Planes>
FR_HD void quads(int64_t n, const T* __restrict g, const T* __restrict g_right, const T* __restrict g_below,
                 const T* __restrict g_last, const uint8_t* __restrict o, const uint8_t* __restrict o_right,
                 const uint8_t* __restrict o_below, const uint8_t* __restrict o_last, acc_t<T>* __restrict even,
                 acc_t<T>* __restrict even_right, acc_t<T>* __restrict odd, acc_t<T>* __restrict odd_right) {
  using A = acc_t<T>;
  using Index = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
  for (int64_t l = 0; l < n; ++l) {
    const A v = load(g[l]), right = load(g_right[l]), below = load(g_below[l]), last = load(g_last[l]);
    const Index at = o[l], at_right = o_right[l], at_below = o_below[l], at_last = o_last[l];
    const A a = picked<A, Index>(at, 4, v);
    const A b = picked<A, Index>(at, 5, v) + picked<A, Index>(at_right, 3, right);
    const A c = picked<A, Index>(at, 7, v) + picked<A, Index>(at_below, 1, below);
    const A d = picked<A, Index>(at, 8, v) + picked<A, Index>(at_right, 6, right) + picked<A, Index>(at_below, 2, below) +
                picked<A, Index>(at_last, 0, last);
    if constexpr (Planes) {
      even[2 * l] = a, even[2 * l + 1] = b, odd[2 * l] = c, odd[2 * l + 1] = d;
    } else {
      even[l] = a, even_right[l] = b, odd[l] = c, odd_right[l] = d;
    }
  }
}

// A row of windows, or `none` of them: gradients of 0 and offsets that point nowhere.
template <typename T>
struct Windows { const T* grad; const uint8_t* offsets; bool none; };

// The gradient of act's output in two rows of 2Q pixels, from the row of windows between them and the one below.
//
// To the right of a plane's last window the next row's first is read, which never picks the column on its left: that is
// padding. `end`: nothing lies behind these rows in memory.
template <typename T>
FR_CLONES void unpool_rows(const Pool& s, Windows<T> here, Windows<T> below, Windows<T> none, bool end, acc_t<T>* even,
                           acc_t<T>* odd) {
  if (s.lanes == 1) {
    const int64_t n = end ? s.q - 1 : s.q;
    quads<T, true>(n, here.grad, here.grad + 1, below.grad, below.grad + 1, here.offsets, here.offsets + 1, below.offsets,
                   below.offsets + 1, even, nullptr, odd, nullptr);
    if (!end) return;
    return quads<T, true>(1, here.grad + n, none.grad, below.grad + n, none.grad, here.offsets + n, none.offsets,
                          below.offsets + n, none.offsets, even + 2 * n, nullptr, odd + 2 * n, nullptr);
  }
  const int64_t step = s.lanes, step_below = below.none ? 0 : step;
  for (int64_t j = 0; j < s.q; ++j) {
    const Windows<T> right = j + 1 < s.q ? Windows<T>{here.grad + step, here.offsets + step, false} : none;
    const Windows<T> last =
        j + 1 < s.q ? Windows<T>{below.grad + step_below, below.offsets + step_below, false} : none;
    quads<T, false>(step, here.grad, right.grad, below.grad, last.grad, here.offsets, right.offsets, below.offsets,
                    last.offsets, even, even + step, odd, odd + step);
    here.grad += step, here.offsets += step, below.grad += step_below, below.offsets += step_below;
    even += 2 * step, odd += 2 * step;
  }
}

// The gradient of act's output, two rows at a time. One per thread.
template <typename T>
class Unpooled {
  using A = acc_t<T>;

 public:
  Unpooled(const Pool& s, const T* grad, const uint8_t* offsets)
      : s_(s), grad_(grad), offsets_(offsets), rows_(scratch<A>(4 * s.out_row())), zeros_(scratch<T>(s.out_row() + 1)),
        nowhere_(scratch<uint8_t>(s.out_row() + 1)) {
    std::fill_n(zeros_.get(), s.out_row() + 1, T{});
    std::fill_n(nowhere_.get(), s.out_row() + 1, uint8_t{255});
  }

  // f(offset of a row in x, its gradient) for the one or two rows 2p, 2p + 1 of an image.
  template <typename F>
  void rows(int64_t image, int64_t p, const F& f) {
    const Windows<T> none{zeros_.get(), nowhere_.get(), true};
    const int64_t i = (image * s_.p + p) * s_.out_row(), size = 2 * s_.out_row();
    const bool end = i + (p + 1 < s_.p ? size : s_.out_row()) == s_.out_numel();
    const Windows<T> below = p + 1 < s_.p ? Windows<T>{grad_ + i + s_.out_row(), offsets_ + i + s_.out_row(), false} : none;
    unpool_rows<T>(s_, {grad_ + i, offsets_ + i, false}, below, none, end, rows_.get(), rows_.get() + size);
    for (int64_t h = 2 * p; h < std::min(2 * p + 2, s_.h); ++h) {
      f((image * s_.h + h) * s_.row(), rows_.get() + h % 2 * size);
    }
  }

 private:
  const Pool& s_;
  const T* grad_;
  const uint8_t* offsets_;
  std::unique_ptr<A[]> rows_;
  std::unique_ptr<T[]> zeros_;
  std::unique_ptr<uint8_t[]> nowhere_;
};

// Pass 1 reads the windows and x, pass 2 reads them again and writes grad_x; planes whose channels fit in the L2 cache are
// read once, and given statistics (Frozen) need pass 1 alone.
template <typename T, bool Relu, bool Frozen>
void backward(const Pool& s, const T* grad, const uint8_t* offsets, const T* x, T* grad_x, const Vectors<acc_t<T>>& vectors,
              const ParameterGrads<acc_t<T>>& grads) {
  using A = acc_t<T>;
  constexpr Mask mask = Relu ? Mask::recompute : Mask::none;
  const Tile tile = s.lanes == 1 ? Tile{1, s.w, 0} : Tile{s.w, s.lanes, s.lanes};
  const auto sum_row = [=](int64_t i, const A* g, const Lanes<A>& k, A* sum, A* sum_x) {
    grad_sums<T, mask, Frozen, A>(tile, g, x + i, nullptr, nullptr, grad_x + i, k.mean, k.scale, k.beta, sum, sum_x);
  };
  const auto apply_row = [=](int64_t i, const A* g, const Lanes<A>& k) {
    grad_apply<T, Relu, A>(tile, g, x + i, grad_x + i, k.mean, k.scale, k.beta, k.k1, k.k2);
  };
  if (s.shape.rows) {
    const int64_t c = s.lanes, n = s.shape.n;
    const int64_t bands = std::min({s.p, ceil_div(64, n), std::max<int64_t>(1, s.shape.numel() / n / kGrain)});
    auto parts = scratch<GradSums>(n * bands * c);
    auto memory = scratch<A>(c * Lanes<A>::kVectors);
    const Lanes<A> k(memory.get(), c);
    for (int64_t i = 0; i < c; ++i) k.set(vectors, i, i, 1, 1);
    parallel_items(n * bands, s.shape.numel() / (n * bands), false, [&](int64_t item) {
      Unpooled<T> g(s, grad, offsets);
      GradSums* part = &parts[item * c];
      std::fill_n(part, c, GradSums{});
      auto sums = scratch<A>(2 * c);
      const int64_t band = item % bands;
      for (int64_t p = s.p * band / bands; p < s.p * (band + 1) / bands; ++p) {
        fill(sums.get(), 2 * c, A(0));
        g.rows(item / bands, p, [&](int64_t i, const A* row) { sum_row(i, row, k, sums.get(), sums.get() + c); });
        for (int64_t i = 0; i < c; ++i) part[i].g += double(sums[i]), part[i].gx += double(sums[c + i]);
      }
    });
    for (int64_t i = 0; i < c; ++i) {
      GradSums total{};
      for (int64_t item = 0; item < n * bands; ++item) {
        total.g += parts[item * c + i].g, total.gx += parts[item * c + i].gx;
      }
      k.set_grad(grads.set(i, total, vectors.rstd(i)), i, 1, 1);
    }
    if constexpr (!Frozen) {
      parallel_ranges(n * s.p, 2 * s.row(), [&](int64_t begin, int64_t end) {
        Unpooled<T> g(s, grad, offsets);
        for (int64_t j = end; j-- > begin;) {
          g.rows(j / s.p, j % s.p, [&](int64_t i, const A* row) { apply_row(i, row, k); });
        }
      });
    }
    return;
  }
  parallel_ranges(s.shape.c, s.shape.count(), [&](int64_t begin, int64_t end) {
    Unpooled<T> g(s, grad, offsets);
    auto memory = scratch<A>(s.w * Lanes<A>::kVectors);
    const Lanes<A> k(memory.get(), s.w);
    auto sums = scratch<A>(2 * s.w);
    for (int64_t c = begin; c < end; ++c) {
      k.set(vectors, c, 0, s.w, 1);
      GradSums total{};
      for (int64_t n = 0; n < s.shape.n; ++n) {
        fill(sums.get(), 2 * s.w, A(0));
        for (int64_t p = 0; p < s.p; ++p) {
          g.rows(n * s.shape.c + c, p, [&](int64_t i, const A* row) { sum_row(i, row, k, sums.get(), sums.get() + s.w); });
        }
        total.g += double(lane_sum(sums.get(), s.w)), total.gx += double(lane_sum(sums.get() + s.w, s.w));
      }
      k.set_grad(grads.set(c, total, vectors.rstd(c)), 0, s.w, 1);
      if constexpr (!Frozen) {
        for (int64_t n = s.shape.n; n-- > 0;) {
          for (int64_t p = s.p; p-- > 0;) {
            g.rows(n * s.shape.c + c, p, [&](int64_t i, const A* row) { apply_row(i, row, k); });
          }
        }
      }
    }
  });
}

// ---- operators --------------------------------------------------------------------------------------------------------

void check_pooled(const Tensor& t, const Pool& s, const char* name) {
  const auto size = s.out_size(), stride = s.out_stride();
  STD_TORCH_CHECK(t.dim() == 4, name, " must be (N, C, P, Q)");
  for (int64_t d = 0; d < 4; ++d) {
    STD_TORCH_CHECK(t.size(d) == size[d], name, " must have one value per window");
    STD_TORCH_CHECK(size[d] <= 1 || t.stride(d) == stride[d] || t.numel() == 0, name, " must have the layout of x");
  }
}

// (out, offsets); no statistics are updated where `stats` is nullptr.
template <typename T>
std::pair<Tensor, Tensor> pooled(const Tensor& x, const Pool& s, const Vectors<acc_t<T>>& vectors,
                                 const Statistics<acc_t<T>>* stats, bool relu, bool with_offsets) {
  const auto size = s.out_size(), stride = s.out_stride();
  const int64_t none = 0, one = 1;
  Tensor out = new_large(x, 4, size.data(), stride.data(), dtype_code(x));
  Tensor offsets = with_offsets ? new_strided(x, 4, size.data(), stride.data(), aoti_torch_dtype_uint8())
                                : new_strided(x, 1, &none, &one, aoti_torch_dtype_uint8());
  if (s.shape.numel()) {
    dispatch_bool(relu, [&](auto relu) {
      dispatch_bool(with_offsets, [&](auto with_offsets) {
        forward<T, relu.value, with_offsets.value>(s, read<T>(x), write<T>(out), write<uint8_t>(offsets), vectors, stats);
      });
    });
  }
  return {out, offsets};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act_pool_train_forward(
    const Tensor& x, const OptionalTensor& gamma, const OptionalTensor& beta, const OptionalTensor& running_mean,
    const OptionalTensor& running_var, double momentum, double eps, bool relu, bool with_offsets) {
  const Pool s(x);
  const int64_t c = s.shape.c;
  const ScalarType acc = acc_dtype(x.scalar_type());
  Tensor mean = new_zero_vector(x, c), var = new_zero_vector(x, c);
  std::optional<std::pair<Tensor, Tensor>> result;
  dispatch_dtype(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const Vectors<A> vectors{vector_data<const A>(gamma, c, acc, "gamma"), vector_data<const A>(beta, c, acc, "beta"),
                             write<A>(mean), write<A>(var), eps};
    const Statistics<A> stats{write<A>(mean), write<A>(var), vector_data<A>(running_mean, c, acc, "running_mean"),
                              vector_data<A>(running_var, c, acc, "running_var"), momentum, double(s.shape.count())};
    result = pooled<T>(x, s, vectors, &stats, relu, with_offsets);
  });
  return {result->first, result->second, mean, var};
}

std::tuple<Tensor, Tensor> bn_act_pool_eval_forward(const Tensor& x, const OptionalTensor& gamma,
                                                    const OptionalTensor& beta, const Tensor& mean, const Tensor& var,
                                                    double eps, bool relu, bool with_offsets) {
  const Pool s(x);
  const int64_t c = s.shape.c;
  const ScalarType acc = acc_dtype(x.scalar_type());
  std::optional<std::pair<Tensor, Tensor>> result;
  dispatch_dtype(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const Vectors<A> vectors{vector_data<const A>(gamma, c, acc, "gamma"), vector_data<const A>(beta, c, acc, "beta"),
                             vector_data<const A>(mean, c, acc, "mean"), vector_data<const A>(var, c, acc, "var"), eps};
    result = pooled<T>(x, s, vectors, nullptr, relu, with_offsets);
  });
  return {result->first, result->second};
}

std::tuple<Tensor, Tensor, Tensor> bn_act_pool_backward(const Tensor& grad, const Tensor& offsets, const Tensor& x,
                                                        const OptionalTensor& gamma, const OptionalTensor& beta,
                                                        const Tensor& mean, const Tensor& var, double eps, bool relu,
                                                        bool training) {
  const Pool s(x);
  const int64_t c = s.shape.c;
  const ScalarType acc = acc_dtype(x.scalar_type());
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type(), "grad must have the dtype of x");
  STD_TORCH_CHECK(offsets.scalar_type() == ScalarType::Byte, "offsets must be uint8");
  check_pooled(grad, s, "grad");
  check_pooled(offsets, s, "offsets");
  Tensor grad_x = new_large_like(x), grad_gamma = new_zero_vector(x, c), grad_beta = new_zero_vector(x, c);
  if (s.shape.numel() == 0) return {grad_x, grad_gamma, grad_beta};
  dispatch_dtype(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const Vectors<A> vectors{vector_data<const A>(gamma, c, acc, "gamma"), vector_data<const A>(beta, c, acc, "beta"),
                             vector_data<const A>(mean, c, acc, "mean"), vector_data<const A>(var, c, acc, "var"), eps};
    const ParameterGrads<A> grads{write<A>(grad_gamma), write<A>(grad_beta), double(s.shape.count())};
    dispatch_bool(relu, [&](auto relu) {
      dispatch_bool(!training, [&](auto frozen) {
        backward<T, relu.value, frozen.value>(s, read<T>(grad), read<uint8_t>(offsets), read<T>(x), write<T>(grad_x),
                                              vectors, grads);
      });
    });
  });
  return {grad_x, grad_gamma, grad_beta};
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_cpp, CPU, m) {
  m.impl("bn_act_pool_train_forward", TORCH_BOX(&fused_resnet::bn_act_pool_train_forward));
  m.impl("bn_act_pool_eval_forward", TORCH_BOX(&fused_resnet::bn_act_pool_eval_forward));
  m.impl("bn_act_pool_backward", TORCH_BOX(&fused_resnet::bn_act_pool_backward));
}
