"""Where the time of a model goes, by operation class: NLP-Perf of NLP-Fast (Section III-A).

>>> profile = tvmstruct.profile(model, {"input_ids": (1, 128), "attention_mask": (1, 128)})
>>> profile.show()
>>> tvmstruct.profiling.sweep(config, ["seq", "hidden"])  # base, S-4x, H-4x
"""

from tvmstruct.profiling.result import Profile, Row
from tvmstruct.profiling.run import profile

__all__ = ["Profile", "Row", "profile"]
