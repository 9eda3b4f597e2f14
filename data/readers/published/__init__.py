"""Readers of data sets in the form published by their authors: CIFAR, SVHN, TinyImageNet and MNIST."""
