"""What lies beside a pool and explains it to strangers."""
