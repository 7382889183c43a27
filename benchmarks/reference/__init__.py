"""The networks in the form of their published code, to compare speed with.

Written from the papers' and repositories' descriptions, with the operations of the published training code where it
spends time: modulations of every token, rotary tables built on the host, a loop over experts, dense masks, averages of
weights parameter by parameter. Layers in which nothing differs are ours. Parameters bear the released names, so a
reference takes the weights of ours.
"""
