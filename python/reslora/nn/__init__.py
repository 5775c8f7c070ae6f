"""The adapted layer while a model runs: what it computes, reads of others and hands on."""
