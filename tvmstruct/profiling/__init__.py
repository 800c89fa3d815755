"""Where the time of a model goes, by operation class: NLP-Perf of NLP-Fast (Section III-A)."""
