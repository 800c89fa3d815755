"""The VTA FPGA accelerator: instruction set, simulator, cycle model, exploration."""
