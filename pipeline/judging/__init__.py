"""How natural mixes are: samples, measures and what they come to."""
