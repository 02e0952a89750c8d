"""Reference-guided pairwise judging and alignment by self-judged DPO (after RefEval/RefMatch, arXiv
2602.16802).
"""
