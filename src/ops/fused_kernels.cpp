// `adapt` on CUDA: kernels where they save a pass over a wide matrix or a launch, ATen's GEMMs for
// the rest.
//
// In bf16 and fp16: `project` with dropout or norms, `project_back` and `project_grad` with
// dropout, `expand_grad` up to rank 32, beyond which its partial sums cost what it saves. In fp32
// and fp64, and for more rows than these kernels take, dropout is a pass of its own (`drop`).
// Blocks of A and B are stacked, and gradients cut apart, by `pieces`, in one launch for all.
// Everything is enqueued on the current stream; nothing waits.
#include "ops/fused_kernels.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>

#include "cuda/elementwise.h"
#include "ops/pieces.h"

namespace reslora::ops {
namespace {

// Above kMaxRank rows of A, x is read once for each kMaxRank of them; more often than twice, and a
// dropped copy of x is cheaper.
constexpr int64_t kMostReads = 2;

/// True where the kernels for matrices take x with this many rows of A.
bool has_kernels(const Tensor& x, int64_t rank) {
  return is_16_bit(x) && x.numel() > 0 && rank > 0 && rank <= kMostReads * cuda::kMaxRank;
}

cuda::Type type_of(const Tensor& t) {
  return t.scalar_type() == at::kHalf ? cuda::Type::kHalf : cuda::Type::kBFloat16;
}

/// t [rows, columns] for a kernel that reads it.
cuda::ConstMatrix read(const Tensor& t) {
  return {t.const_data_ptr(), t.size(0), t.size(1), t.stride(0)};
}

/// t [rows, columns] for a kernel that writes it.
cuda::Matrix written(const Tensor& t) {
  return {t.mutable_data_ptr(), t.size(0), t.size(1), t.stride(0)};
}

/// fp32 [count, rows, columns] for what blocks leave to be added up.
Tensor parts_of(int64_t count, int64_t rows, int64_t columns, const Tensor& like) {
  return at::empty({count, rows, columns}, like.options().dtype(at::kFloat));
}

/// The parts for a kernel that writes them.
cuda::Parts written_in_parts(const Tensor& parts) {
  return {parts.mutable_data_ptr<float>(), parts.stride(0), parts.stride(1)};
}

// ---- Dropout ------------------------------------------------------------------------------------

/// The mask for a kernel; makes room for bits that are still to be drawn.
cuda::Mask mask_for(const Tensor& x, Mask& mask) {
  if (!mask.is_on) return {};
  const auto level = static_cast<uint32_t>(std::lround(mask.keep * 65536.0));
  if (mask.bits.defined()) {
    mask.bits = mask.bits.contiguous();
    auto* bits = const_cast<uint8_t*>(mask.bits.const_data_ptr<uint8_t>());  // only read
    return {cuda::Dropout::kGiven, bits, level, {}};
  }
  mask.bits = at::empty({x.size(0), (x.size(1) + 7) / 8}, x.options().dtype(at::kByte));
  return {cuda::Dropout::kDrawn, mask.bits.mutable_data_ptr<uint8_t>(), level, next_philox(x)};
}

/// Kept x, in a matrix of its own; the bits are drawn unless they are given.
Tensor dropped(const Tensor& x, Mask& mask) {
  const Tensor dense = with_dense_rows(x);
  const Tensor out = at::empty(x.sizes(), x.options());
  check_launch(cuda::launch_drop({element_of(x), read(dense), written(out), mask_for(x, mask)},
                                 current_stream()));
  return out;
}

// ---- Down ---------------------------------------------------------------------------------------

/// fp32 [2 G] from the blocks' sums of x^2 and from u.
Tensor norms_from(const Tensor& squares, const Tensor& u, at::ArrayRef<Range> own) {
  const auto count = static_cast<int64_t>(own.size());
  Tensor norms = at::empty({2 * count}, squares.options());
  for (int64_t done = 0; done < count; done += cuda::kMaxPieces) {
    cuda::NormsArgs args = {squares.const_data_ptr<float>(),
                            squares.numel(),
                            strided(u),
                            u.size(0),
                            {},
                            {},
                            0,
                            norms.mutable_data_ptr<float>() + 2 * done};
    for (int64_t g = done; g < count && args.count < cuda::kMaxPieces; ++g) {
      args.first[args.count] = own[g].first;
      args.columns[args.count++] = own[g].size;
    }
    check_launch(cuda::launch_norms(args, current_stream()));
  }
  return norms;
}

/// The whole of `project` in one or two reads of x.
Tensor project_at_once(const Tensor& x, Mask& mask, const Tensor& rows, at::ArrayRef<Range> own,
                       Tensor* norms) {
  const Tensor dense = with_dense_rows(x);
  const auto alpha = static_cast<float>(mask.is_on ? 1 / mask.keep : 1.0);
  cuda::ProjectArgs args = {type_of(x), read(dense),      {}, {}, alpha, {}, nullptr,
                            {},         multiprocessors()};
  const cuda::Cut cut = cut_of(args);
  const Tensor u = at::empty({x.size(0), rows.size(0)}, x.options());
  Tensor parts, squares;
  if (cut.ranges > 1) parts = parts_of(cut.ranges, u.size(0), u.size(1), x);
  if (norms) squares = at::empty({cut.tiles * cut.ranges}, x.options().dtype(at::kFloat));
  for (int64_t first = 0; first < rows.size(0); first += cuda::kMaxRank) {
    const int64_t count = std::min(cuda::kMaxRank, rows.size(0) - first);
    args.A = read(rows.narrow(0, first, count));
    args.u = written(u.narrow(1, first, count));
    args.mask = mask_for(x, mask);
    args.squares = norms && first == 0 ? squares.mutable_data_ptr<float>() : nullptr;
    if (parts.defined()) args.parts = written_in_parts(parts.narrow(2, first, count));
    check_launch(cuda::launch_project(args, current_stream()));
  }
  if (parts.defined()) {
    Pieces pieces;
    pieces.add(parts, u, alpha);
    pieces.run();
  }
  if (norms) *norms = norms_from(squares, u, own);
  return u;
}

Tensor project(const Tensor& x, Mask& mask, at::TensorList A, at::ArrayRef<Range> own,
               Tensor* norms) {
  const Tensor rows = stacked_rows(A, x);
  if ((mask.is_on || norms) && has_kernels(x, rows.size(0)))
    return project_at_once(x, mask, rows, own, norms);
  Tensor u;
  if (mask.is_on) {
    u = at::empty({x.size(0), rows.size(0)}, x.options());
    u.addmm_(dropped(x, mask), rows.t(), 0, 1 / mask.keep);
  } else {
    u = at::mm(x, rows.t());
  }
  if (norms) *norms = norms_of(x, u, own);
  return u;
}

TapsTaken take_taps(const Tensor& u, at::ArrayRef<Member> members, at::ArrayRef<Range> own) {
  if (u.scalar_type() == at::kDouble) return kAtenKernels.take_taps(u, members, own);
  TapsTaken taken;
  Pieces pieces;
  for (size_t g = 0; g < members.size(); ++g) {
    const Member& member = members[g];
    const int64_t R = own[g].size;
    const Range rest = tap_columns(own, g, u.size(1));
    const bool is_whole = members.size() == 1 && rest.size == 0 && member.taps.empty();
    Tensor s = u, tap;
    if (!is_whole) {
      s = at::empty({u.size(0), R}, u.options());
      pieces.add(u.narrow(1, own[g].first, R), s);
      for (const Tensor& from : member.taps) pieces.plus(readable(as_matrix(from), u));
    }
    if (member.keep_tap && members.size() == 1 && !is_whole) {
      tap = u;  // which nothing else is
    } else if (rest.size > 0 || member.keep_tap) {
      const Range& columns = rest.size > 0 ? rest : own[g];
      tap = at::empty({u.size(0), columns.size}, u.options());
      pieces.add(u.narrow(1, columns.first, columns.size), tap);
    }
    taken.emplace_back(std::move(s), std::move(tap));
  }
  pieces.run();
  return taken;
}

// ---- Up, and back -------------------------------------------------------------------------------

Tensor expand(const Tensor& s, at::TensorList B, at::ArrayRef<double> scaling, const Tensor* base) {
  if (s.scalar_type() == at::kDouble) return kAtenKernels.expand(s, B, scaling, base);
  const auto [columns, alpha] = stacked_columns(B, scaling, s);
  return kAtenKernels.expand(s, {columns}, {alpha}, base);
}

/// What ds and, where it is wanted, the stacked dB are alpha times: matrices, or parts of them.
struct ProductsOfGy {
  Tensor ds;
  Tensor dB;
  double alpha;
};

/// gy B and, where s is given, gy^T s.
ProductsOfGy products_of_gy(const Tensor& gy, const Tensor& columns, double alpha,
                            const Tensor* s) {
  const int64_t T = gy.size(0), out = gy.size(1), R = columns.size(1);
  if (!s || R > cuda::kMaxExpandGradRank || !has_kernels(gy, R)) {
    const Tensor ds = at::empty({T, R}, gy.options());
    Tensor(ds).addmm_(gy, columns, 0, alpha);
    if (!s) return {ds, Tensor(), 1.0};
    const Tensor dB = at::empty({out, R}, gy.options());
    Tensor(dB).addmm_(gy.t(), *s, 0, alpha);
    return {ds, dB, 1.0};
  }
  const Tensor dense = with_dense_rows(gy), entered = with_dense_rows(*s);
  cuda::ExpandGradArgs args = {type_of(gy), read(dense), read(columns),    read(entered),
                               {},          {},          multiprocessors()};
  const cuda::Cut cut = cut_of(args);
  const Tensor ds = parts_of(cut.tiles, T, R, gy), dB = parts_of(cut.ranges, out, R, gy);
  args.ds = written_in_parts(ds), args.dB = written_in_parts(dB);
  check_launch(cuda::launch_expand_grad(args, current_stream()));
  return {ds, dB, alpha};
}

/// Adds gs to ds and gathers du = [ds (+ gtap) | gtap], where it is wanted. Returns ds. Both are
/// whole when the pieces have run.
Tensor gather(Pieces& pieces, const MemberGrads& member, const ProductsOfGy& products,
              const Tensor& like, const Tensor* du) {
  const Tensor gs = member.gs ? as_matrix(*member.gs) : Tensor();
  const Tensor gtap = member.gtap ? as_matrix(*member.gtap) : Tensor();
  const int64_t R = products.ds.size(-1);
  const auto add_to = [&](const Tensor& to) {
    pieces.add(products.ds, to, products.alpha);
    if (gs.defined()) pieces.plus(gs);
  };
  Tensor ds = products.ds;
  if (gs.defined() || ds.dim() == 3) {
    ds = at::empty({ds.size(-2), R}, like.options());
    add_to(ds);
  }
  if (!du) return ds;
  add_to(du->narrow(1, 0, R));
  if (member.keep_tap && gtap.defined()) pieces.plus(gtap);
  const int64_t rest = du->size(1) - R;
  if (rest > 0 && gtap.defined()) pieces.add(gtap, du->narrow(1, R, rest));
  if (rest > 0 && !gtap.defined()) du->narrow(1, R, rest).zero_();
  return ds;
}

std::pair<Tensor, std::vector<Tensor>> expand_grad(const MemberGrads& member, bool needs_dB,
                                                   const Tensor* du) {
  if (!member.gy || member.s->scalar_type() == at::kDouble)
    return kAtenKernels.expand_grad(member, needs_dB, du);
  const Tensor gy = as_matrix(*member.gy), s = as_matrix(*member.s);
  const auto [columns, alpha] = stacked_columns(member.B, member.scaling, gy);
  const ProductsOfGy products = products_of_gy(gy, columns, alpha, needs_dB ? &s : nullptr);
  Pieces pieces;
  const Tensor ds = gather(pieces, member, products, gy, du);
  if (!needs_dB) {
    pieces.run();
    return {ds, {}};
  }
  const auto factors = is_uniform(member.scaling) ? at::ArrayRef<double>() : member.scaling;
  return {ds, cut_apart(pieces, products.dB, member.B, 1, products.alpha, factors)};
}

std::vector<Tensor> project_grad(const Tensor& du, const Tensor& x, const Mask& mask,
                                 at::TensorList A) {
  Pieces pieces;
  if (!mask.is_on) return cut_apart(pieces, at::mm(du.t(), x), A, 0);
  Mask given = mask;
  if (!has_kernels(x, du.size(1))) {
    Tensor dA = at::empty({du.size(1), x.size(1)}, x.options());
    dA.addmm_(du.t(), dropped(x, given), 0, 1 / mask.keep);
    return cut_apart(pieces, dA, A, 0);
  }
  const Tensor columns = with_dense_rows(du), dense = with_dense_rows(x);
  cuda::ProjectGradArgs args = {type_of(x),       {}, read(dense), {}, mask_for(x, given).bits,
                                multiprocessors()};
  const Tensor parts = parts_of(cut_of(args).ranges, du.size(1), x.size(1), x);
  for (int64_t first = 0; first < du.size(1); first += cuda::kMaxRank) {
    const int64_t count = std::min(cuda::kMaxRank, du.size(1) - first);
    args.du = read(columns.narrow(1, first, count));
    args.dA = written_in_parts(parts.narrow(1, first, count));
    check_launch(cuda::launch_project_grad(args, current_stream()));
  }
  return cut_apart(pieces, parts, A, 0, 1 / mask.keep);
}

Tensor project_back(const Tensor& du, at::TensorList A, const Mask& mask) {
  const Tensor rows = stacked_rows(A, du);
  Tensor out = at::empty({du.size(0), rows.size(1)}, du.options());
  Mask given = mask;
  if (mask.is_on && has_kernels(du, du.size(1)) && du.size(1) <= cuda::kMaxRank &&
      rows.size(1) > 0) {
    const Tensor left = with_dense_rows(du);
    const cuda::Mask bits = mask_for(out, given);
    const cuda::ConstMatrix no_base = {nullptr, out.size(0), out.size(1), 0};
    check_launch(cuda::launch_expand({type_of(du), read(left), read(rows), written(out), no_base,
                                      static_cast<float>(1 / mask.keep), bits.bits},
                                     current_stream()));
    return out;
  }
  out.addmm_(du, rows, 0, 1 / mask.keep);
  if (mask.is_on)
    check_launch(cuda::launch_drop({element_of(out), read(out), written(out), mask_for(out, given)},
                                   current_stream()));
  return out;
}

}  // namespace

const DeviceKernels kFusedKernels = {project,     take_taps,    expand,
                                     expand_grad, project_grad, project_back};

void record_norms_fused(const Tensor& norms, const Tensor& ring, const Tensor& count) {
  check_record_norms(norms, ring, count);
  const Tensor dense = norms.contiguous();
  check_launch(cuda::launch_record({dense.const_data_ptr<float>(), ring.mutable_data_ptr<float>(),
                                    ring.size(1), count.mutable_data_ptr<int64_t>()},
                                   current_stream()));
}

}  // namespace reslora::ops
