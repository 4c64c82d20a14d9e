"""One small checkpoint that sees, talks, draws, foresees, watches and acts, trained from nothing on two cores.

litchi demo recipes.tiny:demo     2 cores, about 13 minutes, all stages small
litchi data recipes.tiny          2 cores, 3 minutes
litchi train recipes.tiny         2 cores, about 85 to 100 minutes; needs a C++ compiler, or --set train.compile=false
litchi eval recipes.tiny          2 cores

The rooms are BabyAI's, rendered by MiniGrid at 64x64 pixels. A picture is 16 tokens of 4 tiles; the codec
is lossless.
"""

from __future__ import annotations

from dataclasses import replace

from litchi.data.run import DataConfig
from litchi.envs.minigrid import ACTIONS, SPACE
from litchi.eval.run import Bars, EvalConfig
from litchi.model.codec import TileCodecConfig
from litchi.model.network import Mask, ModelConfig
from litchi.run import Run
from litchi.schema.processor import Discrete, Noising
from litchi.schema.sequence import Modality
from litchi.serve.run import ServeConfig
from litchi.train.batches import BatchConfig
from litchi.train.fit import FitConfig
from litchi.train.optimizer import OptimizerConfig
from litchi.train.run import TrainConfig
from litchi.train.schedule import Trapezoid

CODEC = TileCodecConfig(patch=16, tile=8, levels=(4, 4, 4, 4))

TOKENS = {"talk": 116, "describe": 73, "draw": 64, "foresee": 171, "play": 156, "watch": 151, "act": 103}
"""Mean length of a sample of each source."""

SHARES = {"talk": 0.40, "describe": 0.12, "draw": 0.18, "foresee": 0.10, "play": 0.02, "watch": 0.09, "act": 0.09}
"""Of the tokens that are read in training, how many are of each source."""

EMPHASIS = {"talk": 2.0, "watch": 8.0, "act": 5.0}
"""A caption has fifty labels, an answer two, a clip eleven: captions alone would take most of the gradient."""


def run() -> Run:
    return Run(
        name="tiny",
        data=DataConfig(),
        mixture={source: share / TOKENS[source] for source, share in SHARES.items()},
        fit=FitConfig(
            vocab_size=544,
            phrases=128,
            codec=CODEC,
            spaces={SPACE: Discrete(ACTIONS)},
            noising=Noising(blank_frames=0.9, blank_pictures=0.1),
        ),
        model=ModelConfig(
            vocab_size=0,
            width=224,
            num_layers=6,
            num_heads=4,
            num_kv_heads=4,
            head_width=56,
            mlp_width=512,
            modalities={Modality.IMAGE: Mask(CODEC.digits, CODEC.codes)},
        ),
        train=TrainConfig(
            num_steps=9_600,
            batches=BatchConfig(rows=14, row=224, emphasis=EMPHASIS),
            optimizer=OptimizerConfig(lr=1.2e-3, matrix_lr=1.8e-3),
            schedule=Trapezoid(warmup=100, decay=0.75),
            dtype="bfloat16",
            compile=True,
            save_every=400,
        ),
        eval=EvalConfig(bars=Bars(talk=0.95, describe=0.95, draw=0.85, foresee=0.90, watch=0.97, act=0.99)),
        serve=ServeConfig(model="tiny"),
    )


def demo() -> Run:
    """The same, small enough for a coffee: less data, a tenth of the steps, fewer questions."""
    whole = run()
    return replace(
        whole,
        name="demo",
        data=DataConfig(
            train={
                "talk": 12_000,
                "describe": 6_000,
                "draw": 8_000,
                "foresee": 5_000,
                "play": 1_000,
                "watch": 5_000,
                "act": 3_000,
            },
            test={"talk": 64, "describe": 128, "draw": 128, "watch": 128, "foresee": 32},
        ),
        train=replace(
            whole.train,
            num_steps=900,
            batches=BatchConfig(rows=9, row=224, emphasis=EMPHASIS),
            compile=False,
            save_every=50,
            schedule=Trapezoid(warmup=50, decay=0.5),
        ),
        eval=EvalConfig(talk=32, describe=64, draw=128, foresee=16, watch=64, act=128, free_dialogues=0),
        serve=ServeConfig(model="demo"),
    )
