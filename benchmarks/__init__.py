"""Benchmarks of lsmix against a baseline ("floor") or other libraries ("peers"), reported as ratios.

Machines are noisy, so contenders take turns in one run, and the reported ratio is the median of the ratios within a
turn.
"""
