"""How tests compile: more than half of their time is XLA's, most of which these flags save.

What is compiled so runs slower. XLA ends a process whose flags it does not know, and names them:
such a one is to be taken out here.
"""

QUICKLY = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    " --xla_cpu_parallel_codegen_split_count=1 --xla_cpu_emitter_verification_level=0"
)


def flags(devices: int = 0) -> str:
    """For ``XLA_FLAGS``; 0 devices: as many as JAX is told elsewhere."""
    return f"--xla_force_host_platform_device_count={devices} {QUICKLY}" if devices else QUICKLY
