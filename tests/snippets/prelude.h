// The names that the examples of the README and the headers use without declaring them. The program
// is compiled, not run.
#pragma once

#include <reslora/reslora.h>
#include <torch/torch.h>

#include <cmath>
#include <string>
#include <vector>

struct ModelImpl : torch::nn::Module {
  torch::Tensor forward(const torch::Tensor& x) { return x; }
};
TORCH_MODULE(Model);

inline void train(Model&, torch::optim::Optimizer&) {}

extern Model model;
extern std::vector<torch::Tensor> batches;
extern std::vector<reslora::ResLoraLinear> layers;
extern std::vector<reslora::LayerShape> shapes;
extern std::vector<reslora::ModuleInfo> modules;
extern std::vector<reslora::ChainView> views;
extern reslora::LinkedChain chain;
extern reslora::FitCollector collector;
extern reslora::MoveMeasure measure;
extern torch::Tensor attention_mask;
extern reslora::MergePlan plan;
extern reslora::NormWindow norms;
extern reslora::Fit fit;
extern torch::Tensor x, s, y, B, weight;
extern double scaling;
extern std::string sum;
