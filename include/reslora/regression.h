/// @file
/// The regression merge: the best linear function of x_n for what entered B.
///
/// @verbatim
/// v_n = A_n x_n + taps                      (known on calibration batches: the output s of adapt)
/// A'_n = argmin  sum |v_n - A' x_n|^2 + lambda |A' - A0_n|^2
///      = A0_n + (sum v x^T - A0_n sum x x^T) (sum x x^T + lambda I)^-1
/// A0_n = c_n A_n                            (is: the paper's form, c_n = 1 + alpha*)
///      = c_n A_n + sum over k of c_{n-k} A_{n-k}    (ms, of the layers with A of one shape)
/// @endverbatim
///
/// The factors c are fitted too: the best ones for these rows and for kPriorRows more that follow
/// what the norms of training say, where they were recorded. lambda is `ridge` times the mean of
/// |x|^2 over the rows (of centred x in the affine form), so that few rows leave A' near A0. The
/// rank stays r and B is untouched; what remains is the part of the taps that is no linear function
/// of x_n.
///
/// @code{.cpp}
/// reslora::FitCollector collector({chain.view()});
/// chain.collect(&collector, 0);
/// do {
///   for (const auto& batch : batches) {
///     model->forward(batch);
///     collector.end_batch();
///   }
/// } while (collector.finish_pass());  // true: memory held some layers only; once more
/// chain.collect(nullptr);
/// reslora::MergePlan plan(collector.views(), "lsq");
/// @endcode
///
/// Sums are fp32 GEMMs over at most 4096 rows, added up in fp64 (fp64 throughout for fp64 rows),
/// and are solved in fp64 by Cholesky. Layers that merge exactly are left out. Not thread safe.
#pragma once

#include <ATen/core/Tensor.h>
#include <reslora/chain_view.h>
#include <reslora/export.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace reslora {

/// How fits are made.
struct FitOptions {
  double ridge = 0.3;   ///< lambda over the mean of |x|^2; > 0
  bool affine = false;  ///< also fit an offset, for layers with a bias that fit into max_cov_bytes
  int64_t max_cov_bytes = int64_t{4}
                          << 30;  ///< of sums held at once; solving takes one more matrix
  bool keep_sums = false;         ///< keep what a later solve_fit needs
};

/// What a fit is solved from, fp64. Layers that read the same x share `xx`.
struct FitSums {
  at::Tensor xx;     ///< [in, in], sum x x^T
  at::Tensor vx;     ///< [r, in], sum v x^T
  at::Tensor x_sum;  ///< [in]
  at::Tensor v_sum;  ///< [r]
  double vv = 0;     ///< sum |v|^2
  int64_t rows = 0;  ///< calibration rows
};

/// How many rows the norms of training are worth beside those of a calibration.
constexpr double kPriorRows = 64;

/// What a fit of A is pulled to, beside A itself.
struct FitAnchor {
  std::vector<at::Tensor> others;  ///< A of other layers, of the shape of A
  std::vector<double> factors;     ///< of A and of each other by the norms; empty: not known
};

/// The anchor of a layer: for `ms` the A of the layers that it reaches, where they have the shape
/// of its own, and the rule `factored`'s factors where all norms are there. Throws c10::ValueError
/// for a view that has not the tensors of every layer, and for a position that is none.
RESLORA_API FitAnchor fit_anchor(const ChainView& chain, int64_t position);

/// Solves for A' (and the affine form). A: [r, in]. Throws c10::ValueError for sums that are not
/// finite fp64, do not fit A or have negative squares, for no rows, for ridge <= 0, and for an
/// anchor that does not fit A; `name` is the layer's, for messages.
/// Cost: in^3 / 3 flops and two matrices of in x in.
RESLORA_API Fit solve_fit(const FitSums& sums, const at::Tensor& A, const FitOptions& options,
                          const std::string& name, const FitAnchor& anchor = {});

/// Moves a share of every tap to the layer whose input it reads, starting from fits.
///
/// A tap's term s_n B_n A x_j is no linear function of x_n, but it is one of x_j: layer j can
/// compute it itself, and exactly. Where both layers' outputs are added to one stream, as those of
/// o_proj and down_proj are, the term then reaches that stream some layers early; elsewhere it is
/// wrong. So with `share` in [0, 1], layer n is left with the fit of A_n x_n + (1 - share) taps,
/// and layer j gets rows whose B is share s_n / s_j B_n. Measure before keeping (`choose_moves`):
/// half is near the best where it helps. Ranks up to double (`is`, `ms`).
///
/// Returns a fit for every layer, each with a B of its own. Layers whose sources have other
/// out_features keep their taps. Throws c10::ValueError where a linked layer has no fit, and for
/// tensors that do not fit the chain.
RESLORA_API std::vector<Fit> move_taps(const ChainView& chain, double share = 0.5);

/// What collecting took, for reports.
struct FitCost {
  int64_t passes = 0;          ///< over the calibration batches
  int64_t peak_bytes = 0;      ///< of sums at once
  int64_t row_file_bytes = 0;  ///< rows written to a temporary file (layers above max_cov_bytes)
  int64_t solver_steps = 0;    ///< reads of such a file by the iterative solver
};

/// Collects sums over calibration batches and solves them; see above.
class RESLORA_API FitCollector {
 public:
  /// Prepares to fit every layer of `chains` that does not merge exactly. Throws c10::ValueError
  /// for options out of range, for tensors that do not fit a chain, and with `affine` for chains
  /// whose layers have no bias at all.
  explicit FitCollector(std::vector<ChainView> chains, FitOptions options = {});
  ~FitCollector();
  /// Moves the sums; the source may only be destroyed.
  FitCollector(FitCollector&&) noexcept;
  /// Moves the sums; the source may only be destroyed.
  FitCollector& operator=(FitCollector&&) noexcept;

  /// Begins a batch that is padded: rows that its masks call padding are left out until
  /// `end_batch`. `masks` as in `padding_masks` (calibration.h), which checks them; which one
  /// belongs to a layer's rows, `row_mask` says, and `padding_warning` tells of layers without one.
  void begin_batch(const std::vector<at::Tensor>& masks);
  /// Adds the rows of one call of a layer: x [..., in], v [..., r]. Layers that are handed the same
  /// tensor x one after the other share its covariance. What does not fit into max_cov_bytes waits
  /// for the next pass, as do layers that shared their x in one call and do not in another; a layer
  /// that alone exceeds it goes to a temporary file. Throws c10::ValueError for a layer that is
  /// none and for tensors that do not fit it. Cost: T in (in + 2 r) multiplications.
  void add(int64_t chain, int64_t position, const at::Tensor& x, const at::Tensor& v);
  /// Ends a batch: forgets the last x, and the masks.
  void end_batch();
  /// Solves what this pass collected and frees it. True: layers are left, run the batches again.
  /// Throws c10::ValueError, naming the layer, where a layer saw no row in a pass that it was
  /// waiting for, or where its sums are not finite.
  bool finish_pass();

  /// The chains with `LayerView::fit` set for every layer solved so far.
  const std::vector<ChainView>& views() const;
  /// What a layer was solved from, where `keep_sums` was asked for and it fitted into memory.
  /// Throws c10::ValueError for a layer that is none.
  const std::optional<FitSums>& sums(int64_t chain, int64_t position) const;
  /// What collecting has taken so far.
  const FitCost& cost() const;
  /// A warning where a batch was padded and a layer's rows had the shape of no mask, else "".
  std::string padding_warning() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace reslora
