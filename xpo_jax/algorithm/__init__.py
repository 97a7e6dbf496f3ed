"""The method: what the paper defines and its JAX form. Start here to understand or change what a run learns.

Read losses, logps and packing, then update and optimizer, then sampling, sampler, prefetch and pairing; replay_buffer
holds past pairs, and programs compiles all of it for a mesh.
"""
