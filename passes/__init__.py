"""Graph rewrites on Relax: one file, one class, ``rewrite(graph, call)``."""
