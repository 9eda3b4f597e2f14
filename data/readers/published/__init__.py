"""Readers of data sets as their authors publish them: CIFAR, SVHN and TinyImageNet."""
