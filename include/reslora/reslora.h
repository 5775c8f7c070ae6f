/// @file
/// Everything of reslora.
///
/// @mainpage reslora: ResLoRA for LibTorch
/// LoRA adapters with residual shortcuts between the adapters of consecutive layers (arXiv
/// 2402.18039), and a merger that folds them into the base weights. Begin with adapters.h (adapt a
/// model by names, train, merge, save) and linear.h (layers and chains); config.h has the options.
/// formulas.h is the paper on one page, ops.h the op that evaluates it. merge.h, regression.h and
/// merge_files.h merge; adapter_io.h and statistics_io.h are the files, and stage.h writes them so
/// that all are there or none.
///
/// Errors are c10::Error (bad input: c10::ValueError), one sentence each; nothing is half-changed
/// after one. Several threads may run and train one adapted model (linear.h).
#pragma once

#include <reslora/adapted_files.h>    // IWYU pragma: export
#include <reslora/adapter_folder.h>   // IWYU pragma: export
#include <reslora/adapter_io.h>       // IWYU pragma: export
#include <reslora/adapters.h>         // IWYU pragma: export
#include <reslora/calibration.h>      // IWYU pragma: export
#include <reslora/chain.h>            // IWYU pragma: export
#include <reslora/chain_view.h>       // IWYU pragma: export
#include <reslora/config.h>           // IWYU pragma: export
#include <reslora/config_json.h>      // IWYU pragma: export
#include <reslora/finishing.h>        // IWYU pragma: export
#include <reslora/formulas.h>         // IWYU pragma: export
#include <reslora/initial_factors.h>  // IWYU pragma: export
#include <reslora/linear.h>           // IWYU pragma: export
#include <reslora/matching.h>         // IWYU pragma: export
#include <reslora/merge.h>            // IWYU pragma: export
#include <reslora/merge_errors.h>     // IWYU pragma: export
#include <reslora/merge_files.h>      // IWYU pragma: export
#include <reslora/merge_rule.h>       // IWYU pragma: export
#include <reslora/model_files.h>      // IWYU pragma: export
#include <reslora/module_names.h>     // IWYU pragma: export
#include <reslora/norm_window.h>      // IWYU pragma: export
#include <reslora/ops.h>              // IWYU pragma: export
#include <reslora/plain_lora.h>       // IWYU pragma: export
#include <reslora/regression.h>       // IWYU pragma: export
#include <reslora/stage.h>            // IWYU pragma: export
#include <reslora/statistics_io.h>    // IWYU pragma: export
