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

/// Asks for a workspace and starts the kernel on the current stream.
template <typename Args>
void launch(cudaError_t (*launcher)(const Args&, cudaStream_t), Args args, const Tensor& like) {
  args.multiprocessors = multiprocessors();
  const auto bytes = static_cast<int64_t>(workspace_bytes(args));
  const Tensor workspace = bytes ? at::empty({bytes}, like.options().dtype(at::kByte)) : Tensor();
  args.workspace = bytes ? workspace.mutable_data_ptr() : nullptr;
  check_launch(launcher(args, current_stream()));
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

/// fp32 [2 G] from the sum of x^2 [1] and from u.
Tensor norms_from(const Tensor& squares, const Tensor& u, at::ArrayRef<Range> own) {
  const auto count = static_cast<int64_t>(own.size());
  Tensor norms = at::empty({2 * count}, squares.options());
  for (int64_t done = 0; done < count; done += cuda::kMaxPieces) {
    cuda::NormsArgs args = {
        squares.const_data_ptr<float>(),           strided(u), u.size(0), {}, {}, 0,
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
  Tensor u = at::empty({x.size(0), rows.size(0)}, x.options());
  Tensor squares;
  if (norms) squares = at::empty({1}, x.options().dtype(at::kFloat));
  const auto alpha = static_cast<float>(mask.is_on ? 1 / mask.keep : 1.0);
  for (int64_t first = 0; first < rows.size(0); first += cuda::kMaxRank) {
    const int64_t count = std::min(cuda::kMaxRank, rows.size(0) - first);
    float* sum = norms && first == 0 ? squares.mutable_data_ptr<float>() : nullptr;
    launch(cuda::launch_project,
           cuda::ProjectArgs{type_of(x), read(dense), read(rows.narrow(0, first, count)),
                             written(u.narrow(1, first, count)), alpha, mask_for(x, mask), sum,
                             nullptr, 0},
           x);
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
  std::vector<Tensor> alive;
  for (size_t g = 0; g < members.size(); ++g) {
    const Member& member = members[g];
    const int64_t R = own[g].size;
    const Range rest = tap_columns(own, g, u.size(1));
    const bool is_whole = members.size() == 1 && rest.size == 0 && member.taps.empty();
    Tensor s = u, tap;
    if (!is_whole) {
      s = at::empty({u.size(0), R}, u.options());
      const size_t most = cuda::kMaxAddends;
      cuda::Piece* piece = &pieces.add(u.narrow(1, own[g].first, R), s);
      for (size_t k = 0; k < member.taps.size(); ++k) {
        if (k > 0 && k % most == 0) {
          pieces.run();  // what is added next must be there
          piece = &pieces.add(s, s);
        }
        alive.push_back(readable(as_matrix(member.taps[k]), u));
        piece->addends[k % most] = strided(alive.back());
      }
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

/// ds = alpha gy B and, where s is given, the stacked alpha gy^T s.
std::pair<Tensor, Tensor> products_of_gy(const Tensor& gy, const Tensor& columns, double alpha,
                                         const Tensor* s) {
  const Tensor ds = at::empty({gy.size(0), columns.size(1)}, gy.options());
  if (!s || s->size(1) > cuda::kMaxExpandGradRank || !has_kernels(gy, s->size(1))) {
    Tensor(ds).addmm_(gy, columns, 0, alpha);
    if (!s) return {ds, Tensor()};
    Tensor dB = at::empty({gy.size(1), s->size(1)}, gy.options());
    return {ds, dB.addmm_(gy.t(), *s, 0, alpha)};
  }
  const Tensor dense = with_dense_rows(gy), entered = with_dense_rows(*s);
  const Tensor dB = at::empty({gy.size(1), s->size(1)}, gy.options());
  launch(cuda::launch_expand_grad,
         cuda::ExpandGradArgs{type_of(gy), read(dense), read(columns), read(entered), written(ds),
                              written(dB), static_cast<float>(alpha), nullptr, 0},
         gy);
  return {ds, dB};
}

/// Adds gs to ds and gathers du = [ds (+ gtap) | gtap], all that is wanted, in one launch.
Tensor gather(const MemberGrads& member, const Tensor& ds, const Tensor* du) {
  Pieces pieces;
  const Tensor gs = member.gs ? as_matrix(*member.gs) : Tensor();
  const Tensor gtap = member.gtap ? as_matrix(*member.gtap) : Tensor();
  Tensor sum = ds;
  if (gs.defined()) {
    sum = at::empty(ds.sizes(), ds.options());
    pieces.add(ds, sum).addends[0] = strided(gs);
  }
  if (du) {
    const int64_t R = ds.size(1), rest = du->size(1) - R;
    cuda::Piece& own = pieces.add(ds, du->narrow(1, 0, R));
    if (gs.defined()) own.addends[0] = strided(gs);
    if (member.keep_tap && gtap.defined()) own.addends[1] = strided(gtap);
    if (rest > 0 && gtap.defined()) {
      pieces.add(gtap, du->narrow(1, R, rest));
    } else if (rest > 0) {
      du->narrow(1, R, rest).zero_();
    }
  }
  pieces.run();
  return sum;
}

std::pair<Tensor, std::vector<Tensor>> expand_grad(const MemberGrads& member, bool needs_dB,
                                                   const Tensor* du) {
  if (!member.gy || member.s->scalar_type() == at::kDouble)
    return kAtenKernels.expand_grad(member, needs_dB, du);
  const Tensor gy = as_matrix(*member.gy), s = as_matrix(*member.s);
  const auto [columns, alpha] = stacked_columns(member.B, member.scaling, gy);
  const bool is_scaled = is_uniform(member.scaling);
  auto [ds, dB] = products_of_gy(gy, columns, alpha, needs_dB ? &s : nullptr);
  std::vector<Tensor> blocks;
  if (needs_dB)
    blocks = cut_apart(dB, member.B, 1, is_scaled ? at::ArrayRef<double>() : member.scaling);
  return {gather(member, ds, du), std::move(blocks)};
}

std::vector<Tensor> project_grad(const Tensor& du, const Tensor& x, const Mask& mask,
                                 at::TensorList A) {
  if (!mask.is_on) return cut_apart(at::mm(du.t(), x), A, 0);
  Mask given = mask;
  const Tensor dA = at::empty({du.size(1), x.size(1)}, x.options());
  if (!has_kernels(x, du.size(1))) {
    Tensor(dA).addmm_(du.t(), dropped(x, given), 0, 1 / mask.keep);
    return cut_apart(dA, A, 0);
  }
  const Tensor columns = with_dense_rows(du), dense = with_dense_rows(x);
  const cuda::Mask bits = mask_for(x, given);
  for (int64_t first = 0; first < du.size(1); first += cuda::kMaxRank) {
    const int64_t count = std::min(cuda::kMaxRank, du.size(1) - first);
    launch(cuda::launch_project_grad,
           cuda::ProjectGradArgs{type_of(x), read(columns.narrow(1, first, count)), read(dense),
                                 written(dA.narrow(0, first, count)),
                                 static_cast<float>(1 / mask.keep), bits.bits, nullptr, 0},
           x);
  }
  return cut_apart(dA, A, 0);
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
