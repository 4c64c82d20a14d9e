"""Checkpoints that Megatron-core and DeepSpeed themselves wrote, on a CPU, become the network that they trained.

    pip install megatron-core einops; pip install deepspeed hjson py-cpuinfo msgpack   (neither is needed elsewhere)

Both are written for CUDA: what they ask of it and a CPU can do without is replaced before they run, in processes of
their own. Without them the tests skip.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from litchi.model.convert import load_foreign
from tests.model.test_families import scores

TOLERANCE = 1e-4
"""Of logits, fp32: the same sums in another order."""

IDS = list(range(10))

MEGATRON = """
import argparse, contextlib, os, sys
from pathlib import Path
import torch, torch.distributed as dist

def main(rank, world, out, layers_apart):
    torch.cuda.synchronize, torch.cuda.current_device = (lambda *_: None), (lambda: "cpu")
    store = dist.FileStore(str(Path(out) / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.fusions import fused_softmax
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
    from megatron.core.transformer.transformer_config import TransformerConfig
    fused_softmax.get_default_causal_mask = lambda n: torch.triu(torch.ones(n, n), diagonal=1).bool()
    CudaRNGStatesTracker.fork = lambda *_: contextlib.nullcontext()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world)
    config = TransformerConfig(
        num_layers=2, hidden_size=48, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=2,
        use_cpu_initialization=True, add_bias_linear=False, gated_linear_unit=True, normalization="RMSNorm",
        activation_func=torch.nn.functional.silu, qk_layernorm=True, pipeline_dtype=torch.float32,
        bias_activation_fusion=False, bias_dropout_fusion=False, masked_softmax_fusion=False,
        persist_layer_norm=False, tensor_model_parallel_size=world, gradient_accumulation_fusion=False,
    )
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=True)
    net = GPTModel(config, spec, vocab_size=128, max_sequence_length=64, share_embeddings_and_output_weights=False,
                   position_embedding_type="rope").eval()
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):  # what ranks share must be equal, what they divide must differ
            seed = i + (1000 * (1 + rank) if getattr(p, "tensor_model_parallel", False) else 0)
            p.copy_(float(p.dim() == 1) + 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
        scores = net(torch.arange(10)[None], torch.arange(10)[None], None)
    all_scores = [torch.empty_like(scores) for _ in range(world)]
    dist.all_gather(all_scores, scores)
    args = argparse.Namespace(
        num_layers=2, hidden_size=48, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=2,
        group_query_attention=True, kv_channels=12, normalization="RMSNorm", swiglu=True, add_bias_linear=False,
        position_embedding_type="rope", qk_layernorm=True, norm_epsilon=1e-5, rotary_base=10000,
        untie_embeddings_and_output_weights=True, padded_vocab_size=128, vocab_size=100, max_position_embeddings=64,
    )
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    state = net.sharded_state_dict(metadata={"non_homogeneous_layers": layers_apart, "dp_cp_group": group})
    place = Path(out) / "iter_0000007"
    if not rank:
        place.mkdir()
        torch.save(torch.cat(all_scores, -1), Path(out) / "scores.pt")
        (Path(out) / "latest_checkpointed_iteration.txt").write_text("7")
    dist.barrier()
    dist_checkpointing.save({"model": state, "args": args, "iteration": 7}, str(place))
    dist.barrier()

if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4] == "apart")
"""

DEEPSPEED = """
import argparse, os, sys
import torch, torch.distributed as dist

def main(out, stage, tied):
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    import deepspeed, transformers
    from deepspeed.checkpoint import ds_to_universal
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=80, max_position_embeddings=64, tie_word_embeddings=tied,
    )
    net = transformers.LlamaForCausalLM(config)
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}, "bf16": {"enabled": True}}
    settings["zero_allow_untested_optimizer"] = True
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=settings)
    ids = torch.randint(0, 97, (1, 16))
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
    engine.save_checkpoint(out, tag="global_step1")
    ds_to_universal.main(argparse.Namespace(
        input_folder=f"{out}/global_step1", output_folder=f"{out}/global_step1_universal", num_extract_workers=1,
        num_merge_workers=1, keep_temp_folder=False, strict=True, inject_missing_state=True,
    ))
    config.save_pretrained(out)
    net = transformers.LlamaForCausalLM(config).eval()
    state = deepspeed.utils.zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(out, tag="global_step1")
    net.load_state_dict(state)
    with torch.no_grad():
        torch.save(net(torch.arange(10)[None]).logits, f"{out}/scores.pt")

if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3] == "tied")
"""


def write(program: str, folder: Path, *ranks: list[str]) -> torch.Tensor:
    """Run a program once for each rank; the scores that the framework's own model gives."""
    script = folder / "write.py"
    script.write_text(program)
    logs = [(folder / f"{i}.log").open("w+") for i in range(len(ranks))]
    command = [sys.executable, "-W", "ignore", str(script)]
    running = [
        subprocess.Popen([*command, *rank], stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
        for rank, log in zip(ranks, logs, strict=True)
    ]
    codes = [process.wait() for process in running]
    for code, log in zip(codes, logs, strict=True):
        log.seek(0)
        said = log.read()
        log.close()
        assert not code, said[-3000:]
    return torch.load(folder / "scores.pt")[0]


@pytest.mark.skipif(not importlib.util.find_spec("megatron"), reason="megatron-core is not installed")
@pytest.mark.parametrize(("world", "layers"), [(1, "stacked"), (2, "apart")])
def test_what_megatron_wrote_is_its_model(world: int, layers: str, tmp_path: Path) -> None:
    """100 of the 128 rows of its tables are tokens."""
    theirs = write(MEGATRON, tmp_path, *([str(rank), str(world), str(tmp_path), layers] for rank in range(world)))
    gap = (scores(load_foreign(tmp_path), IDS) - theirs[:, :100]).abs().max()
    assert gap <= TOLERANCE


@pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="deepspeed is not installed")
@pytest.mark.parametrize(("stage", "head"), [(1, "tied"), (2, "own"), (3, "own")])
def test_what_deepspeed_wrote_is_its_model(stage: int, head: str, tmp_path: Path) -> None:
    theirs = write(DEEPSPEED, tmp_path, [str(tmp_path), str(stage), head])
    gap = (scores(load_foreign(tmp_path), IDS) - theirs).abs().max()
    assert gap <= TOLERANCE
