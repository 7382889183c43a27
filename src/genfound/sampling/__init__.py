"""Images from a network: what is wanted, how they are drawn, and their grid."""
