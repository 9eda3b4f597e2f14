"""Measurements of lsmix against a floor or a peer, side by side in one run, as ratios.

Machines are noisy, so contenders take turns and what counts is the median of the ratios within a turn.
"""
