"""Export of pools to formats that other libraries read without lsmix."""
