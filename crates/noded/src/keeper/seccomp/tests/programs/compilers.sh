# C with threads and a priority-inheriting mutex, link-time optimisation, the sanitizers where they are installed.
cat > a.c <<'END'
#include <pthread.h>
#include <stdio.h>
static void *nothing(void *argument) { return argument; }
int main(void) {
    pthread_t thread;
    pthread_mutexattr_t kind;
    pthread_mutex_t mutex;
    pthread_mutexattr_init(&kind);
    pthread_mutexattr_setprotocol(&kind, PTHREAD_PRIO_INHERIT);
    pthread_mutex_init(&mutex, &kind);
    pthread_mutex_lock(&mutex);
    pthread_mutex_unlock(&mutex);
    return pthread_create(&thread, 0, nothing, 0) || pthread_join(thread, 0) || puts("hi") < 0;
}
END
printf 'a: a.c\n\tcc -O2 -flto -pthread -o a a.c\n' > Makefile
make -j2
./a
if cc -fsanitize=address -pthread -o b a.c; then ./b; fi
if cc -fsanitize=thread -pthread -o c a.c; then ./c; fi
cat > a.cc <<'END'
#include <iostream>
#include <thread>
int main() { std::thread([] { std::cout << 1; }).join(); }
END
c++ -pthread -o d a.cc
./d
