"""The VTA accelerator: configuration, instructions, simulator, timing, code generation."""
