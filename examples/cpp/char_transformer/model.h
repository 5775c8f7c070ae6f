// A decoder over characters, written in LibTorch; its linear layers can be adapted.
#pragma once

#include <reslora/linear.h>
#include <torch/torch.h>

constexpr int64_t kCharacters = 128;  // ASCII

struct BlockImpl : torch::nn::Module {
  BlockImpl(int64_t width, int64_t head_count)
      : heads(head_count),
        q_proj(width, width),
        k_proj(width, width),
        v_proj(width, width),
        o_proj(width, width),
        up_proj(width, 4 * width),
        down_proj(4 * width, width),
        first_norm(torch::nn::LayerNormOptions({width})),
        second_norm(torch::nn::LayerNormOptions({width})) {
    register_module("q_proj", q_proj);
    register_module("k_proj", k_proj);
    register_module("v_proj", v_proj);
    register_module("o_proj", o_proj);
    register_module("up_proj", up_proj);
    register_module("down_proj", down_proj);
    register_module("first_norm", first_norm);
    register_module("second_norm", second_norm);
  }

  /// x: [batch, length, width] -> the same.
  torch::Tensor forward(torch::Tensor x) {
    const auto split = [&](const torch::Tensor& t) {
      return t.unflatten(-1, {heads, -1}).transpose(1, 2);
    };
    // q, k and v read one x: evaluated together, they share a down-projection.
    const auto qkv = reslora::forward_together({q_proj.ptr(), k_proj.ptr(), v_proj.ptr()},
                                               first_norm->forward(x));
    const torch::Tensor mixed = at::scaled_dot_product_attention(
        split(qkv[0]), split(qkv[1]), split(qkv[2]), {}, 0.0, /*is_causal=*/true);
    x = x + o_proj->forward(mixed.transpose(1, 2).flatten(-2));
    return x + down_proj->forward(torch::gelu(up_proj->forward(second_norm->forward(x))));
  }

  int64_t heads;
  reslora::ResLoraLinear q_proj, k_proj, v_proj, o_proj, up_proj, down_proj;
  torch::nn::LayerNorm first_norm, second_norm;
};
TORCH_MODULE(Block);

struct DecoderImpl : torch::nn::Module {
  DecoderImpl(int64_t width, int64_t layer_count, int64_t length)
      : embedding(kCharacters, width),
        place(length, width),
        norm(torch::nn::LayerNormOptions({width})),
        head(width, kCharacters) {
    register_module("embedding", embedding);
    register_module("place", place);
    register_module("layers", layers);
    register_module("norm", norm);
    register_module("head", head);
    for (int64_t n = 0; n < layer_count; ++n) layers->push_back(Block(width, 4));
  }

  /// ids: [batch, length] -> logits [batch, length, characters].
  torch::Tensor forward(const torch::Tensor& ids) {
    torch::Tensor x = embedding->forward(ids) + place->forward(torch::arange(ids.size(1)));
    for (const auto& layer : *layers) x = layer->as<Block>()->forward(x);
    return head->forward(norm->forward(x));
  }

  torch::Tensor loss(const torch::Tensor& ids) {
    const torch::Tensor logits = forward(ids.narrow(1, 0, ids.size(1) - 1));
    return torch::cross_entropy_loss(logits.flatten(0, 1),
                                     ids.narrow(1, 1, ids.size(1) - 1).flatten());
  }

  torch::nn::Embedding embedding, place;
  torch::nn::ModuleList layers;
  torch::nn::LayerNorm norm;
  torch::nn::Linear head;
};
TORCH_MODULE(Decoder);
