"""The papers' claims in small, and the solvers' errors: experiments, not benchmarks.

python -m bench.claims.pndm           PNDM against DDIM; then --page
python -m bench.claims.pds            preconditioned sampling, where the truth is known; then --page
python -m bench.claims.pds_learned    the same on a learned score
python -m bench.claims.solvers        error against network calls, which `bench report` draws
"""
