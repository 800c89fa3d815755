"""VTA: instruction set, simulator, cycle model, quantisation and code generation."""
