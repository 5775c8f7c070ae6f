// Everything of reslora: ResLoRA adapters (arXiv 2402.18039) for LibTorch, and their merger.
#pragma once

#include <reslora/adapter_io.h>     // IWYU pragma: export
#include <reslora/adapters.h>       // IWYU pragma: export
#include <reslora/chain.h>          // IWYU pragma: export
#include <reslora/chain_view.h>     // IWYU pragma: export
#include <reslora/config.h>         // IWYU pragma: export
#include <reslora/config_json.h>    // IWYU pragma: export
#include <reslora/formulas.h>       // IWYU pragma: export
#include <reslora/linear.h>         // IWYU pragma: export
#include <reslora/merge.h>          // IWYU pragma: export
#include <reslora/merge_errors.h>   // IWYU pragma: export
#include <reslora/merge_files.h>    // IWYU pragma: export
#include <reslora/model_files.h>    // IWYU pragma: export
#include <reslora/module_names.h>   // IWYU pragma: export
#include <reslora/norm_window.h>    // IWYU pragma: export
#include <reslora/ops.h>            // IWYU pragma: export
#include <reslora/plain_lora.h>     // IWYU pragma: export
#include <reslora/regression.h>     // IWYU pragma: export
#include <reslora/statistics_io.h>  // IWYU pragma: export
