// libuv's threads, files, watchers, children and sockets; V8's JIT and WebAssembly.
const { Worker, isMainThread } = require('worker_threads');
const [fs, http, os, child] = ['fs', 'http', 'os', 'child_process'].map(require);

if (isMainThread) {
  new Worker(__filename).on('exit', () => {
    child.execFileSync('true');
    fs.writeFileSync('text', 'x');
    fs.copyFileSync('text', 'copy');
    fs.watch('.').close();
    fs.mkdirSync('d/e', { recursive: true });
    fs.cpSync('d', 'f', { recursive: true });
    os.networkInterfaces();
    os.setPriority(5);
    new WebAssembly.Memory({ initial: 1 });
    for (let i = 0, sum = 0; i < 1e7; i++) sum += i;
    const server = http.createServer((_, response) => response.end('ok')).listen(0, '127.0.0.1', () =>
      http.get({ port: server.address().port, host: '127.0.0.1' }, response =>
        response.on('data', data => {
          server.close();
          if (String(data) !== 'ok') process.exit(1);
        })));
  });
}
