"""The options of the executors: `PipelineConfig` is handed down whole, from the command line to the decoder."""

import dataclasses
from typing import Literal

from pipelines.common.settings import Section, setting


@dataclasses.dataclass(frozen=True)
class PipelineConfig(Section):
    """How a plan is carried out. None of this changes what is drawn; the decoder's options may change a last bit.

    Attributes:
      pipeline: auto, dali, torchvision or synthetic (noise in place of images); auto is DALI with a GPU, torchvision
        without.
      decode: DALI: roi decodes the crop alone, full the whole image, the pixels are the same; auto is roi where that
        works, which is tried.
      hw_decoder_load: DALI: fraction of each batch that the GPU's JPEG engine decodes. Between 0 and 1 a batch is
        divided among two decoders, and an image's last bit may depend on which of them decodes it.
      decoder_padding_mib: DALI: memory that each thread of the GPU's decoder takes at once, so that a large image does
        not make it allocate in the middle of a run; 0 is what the largest image takes, 64 at the most.
      threads: host threads that decode, for each rank; 0 divides the cores among the ranks of this machine.
      prefetch: finished batches that wait.
    """

    pipeline: Literal["auto", "dali", "torchvision", "synthetic"] = setting("auto", recipe=False, on_resume="reported")
    decode: Literal["auto", "roi", "full"] = setting("auto", recipe=False, on_resume="reported")
    hw_decoder_load: float = setting(1.0, at_least=0, at_most=1, recipe=False, per_machine=True, on_resume="reported")
    decoder_padding_mib: int = setting(0, at_least=0, recipe=False, per_machine=True)
    threads: int = setting(0, at_least=0, at_most=4096, recipe=False, per_machine=True)
    prefetch: int = setting(2, at_least=1, at_most=4096, recipe=False, per_machine=True)

    def option(self, name: str, value: object) -> str:
        """How a message advises another value of a field. Sections of a command line say it in their own way."""
        return f"{name}={value!r}"
