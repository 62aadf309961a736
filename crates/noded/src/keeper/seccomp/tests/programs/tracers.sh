strace -f -o log true
grep -q exit_group log
strace -f --seccomp-bpf -e trace=execve -o log sh -c 'true; (true)'
grep -q execve log
# A skipped call has number -1 until the tracer has put its answer in.
strace -o log -e inject=chdir:error=EACCES sh -c 'cd / && exit 1; exit 0'
gdb -nx -batch -ex run -ex quit --args true 2>&1 | grep 'exited normally'
