"""Trains a small Hugging Face model from its config. It does not know `resilience`."""

import argparse

import deepspeed
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM


def make_model(name: str) -> torch.nn.Module:
    if name == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, n_positions=16, vocab_size=64))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, vocab_size=64, attention_dropout=0.1))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=0)
    parser.add_argument("--model", choices=("gpt2", "llama"), required=True)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--checkpoints", required=True)
    deepspeed.add_config_arguments(parser)
    args = parser.parse_args()
    torch.manual_seed(2025)
    model = make_model(args.model)
    engine, *_ = deepspeed.initialize(args=args, model=model, model_parameters=model.parameters())
    engine.load_checkpoint(args.checkpoints)
    rank = torch.distributed.get_rank()
    while engine.global_steps < args.steps:
        step = engine.global_steps + 1
        for micro_step in range(engine.gradient_accumulation_steps()):
            generator = torch.Generator().manual_seed(1_009 * step + 101 * micro_step + rank)
            tokens = torch.randint(64, (4, 16), generator=generator)
            loss = engine(input_ids=tokens, labels=tokens).loss
            engine.backward(loss)
            engine.step()
        if rank == 0:
            print(f"step {engine.global_steps} loss {float(loss):.6f}", flush=True)
    engine.save_checkpoint(args.checkpoints)


if __name__ == "__main__":
    main()
