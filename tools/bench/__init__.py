"""How fast a training step is, part by part; `python -m tools.bench`.

Read __main__, then step (a training step with random inputs), parts (what is timed), figures (what is printed),
workload and machine; trl_client and trl_worker run TRL for comparison. device_check is another command, which checks an
accelerator with the same step; its parts are in device_parts and device_training, their sizes in device_scale.
"""
