"""Where the time of a model goes, by operation class: NLP-Perf of NLP-Fast (Section III-A).

>>> profile = tvmstruct.profile(model, {"input_ids": (1, 128), "attention_mask": (1, 128)})
>>> profile.show()
>>> from tvmstruct.profiling import sweep
>>> base, longer, wider = sweep(config, ["seq", "hidden"])
"""

from tvmstruct.profiling.result import DenormalWarning, Profile, Row
from tvmstruct.profiling.run import profile
from tvmstruct.profiling.sweep import sweep

__all__ = ["DenormalWarning", "Profile", "Row", "profile", "sweep"]
