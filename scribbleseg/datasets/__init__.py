"""The data contract, the doctor, augmentation, the cache, and where data comes from."""
